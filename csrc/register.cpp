// The operators of the kdkernels library for CPU tensors, on the LibTorch stable ABI: checks, choice of instruction set, and rows
// spread over torch's threads. Their schemas and fake implementations are in kdkernels/backends/operators.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using kd::Problem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Usable instruction sets, the fastest first.
const std::vector<const kd::Kernels*>& instruction_sets() {
  static const std::vector<const kd::Kernels*> usable = [] {
    std::vector<const kd::Kernels*> found;
#if KD_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back(&kd::avx512_kernels);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      found.push_back(&kd::avx2_kernels);
#endif
    found.push_back(&kd::plain_kernels);
    return found;
  }();
  return usable;
}

std::atomic<const kd::Kernels*> chosen{nullptr};

const kd::Kernels& kernels() {
  const kd::Kernels* current = chosen.load(std::memory_order_relaxed);
  return current ? *current : *instruction_sets().front();
}

// Names of the usable instruction sets with commas between; the one in use comes first.
std::string instruction_set_names() {
  std::string names = kernels().name;
  for (const kd::Kernels* usable : instruction_sets())
    if (usable != &kernels()) names += std::string(",") + usable->name;
  return names;
}

void use_instruction_set(std::string name) {
  for (const kd::Kernels* usable : instruction_sets())
    if (name == usable->name) {
      chosen = usable;
      return;
    }
  STD_TORCH_CHECK(false, "instruction set ", name, " is not usable here; usable: ", instruction_set_names());
}

const kd::DivergenceKernels& find(const std::string& divergence) {
  const kd::Kernels& all = kernels();
  for (int i = 0; i < all.count; ++i)
    if (divergence == all.divergences[i].name) return all.divergences[i];
  STD_TORCH_CHECK(false, "divergence ", divergence, " was not compiled into this build");
  return all.divergences[0];
}

kd::Side side(const Tensor& logits, const std::optional<Tensor>& bias, double scale, double softcap, const char* name) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) == 1 || logits.stride(1) == 1), name,
                  " must be [rows, vocabulary] with adjacent entries in a row");
  kd::Side s{logits.const_data_ptr(), logits.stride(0), kd::Dtype::f32, nullptr, static_cast<float>(scale),
             static_cast<float>(softcap)};
  switch (logits.scalar_type()) {
    case ScalarType::Float: s.dtype = kd::Dtype::f32; break;
    case ScalarType::BFloat16: s.dtype = kd::Dtype::bf16; break;
    case ScalarType::Half: s.dtype = kd::Dtype::f16; break;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->numel() == logits.size(1) && bias->is_contiguous(), name,
                    "'s bias must be contiguous float32 of the vocabulary's size");
    s.bias = bias->const_data_ptr<float>();
  }
  return s;
}

void check_rows(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                      tensor.numel() == rows * columns,
                  name, " must be contiguous float32 [", rows, ", ", columns, "]");
}

// The part of a problem that all operators share. `head` is student scale, student softcap, teacher scale, teacher softcap.
Problem problem(const Tensor& x, const Tensor& z, const std::optional<Tensor>& x_bias, const std::optional<Tensor>& z_bias,
                const Tensor& t, double temperature, const std::vector<double>& head, bool metrics) {
  STD_TORCH_CHECK(head.size() == 4, "head must hold 4 numbers");
  STD_TORCH_CHECK(z.dim() == 2 && x.size(0) == z.size(0) && x.size(1) == z.size(1), "x and z must have one shape");
  STD_TORCH_CHECK(t.is_cpu() && t.numel() == 1 && t.scalar_type() == ScalarType::Float, "t must be one float32");
  Problem p{};
  p.x = side(x, x_bias, head[0], head[1], "x");
  p.z = side(z, z_bias, head[2], head[3], "z");
  p.vocabulary = x.size(1);
  p.t = *t.const_data_ptr<float>();
  p.temperature = static_cast<float>(temperature);
  p.metrics = metrics;
  return p;
}

// Both from float64: a small parameter would lose its digits in 1 - float(1 - a).
void set_parameter(Problem& p, double a) {
  p.share = static_cast<float>(a);
  p.rest = static_cast<float>(1.0 - a);
}

void set_labels(Problem& p, const std::optional<Tensor>& labels, int64_t rows) {
  if (!labels) return;
  STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long && labels->numel() == rows && labels->is_contiguous(),
                  "labels must be contiguous int64 [", rows, "]");
  p.labels = labels->const_data_ptr<int64_t>();
}

void set_gradient(Problem& p, Tensor& dx, const Tensor& x, const Tensor& weight, double kd_scale, double ce_scale) {
  STD_TORCH_CHECK(dx.scalar_type() == x.scalar_type() && dx.dim() == 2 && dx.size(0) == x.size(0) && dx.size(1) == x.size(1) &&
                      (dx.size(1) == 1 || dx.stride(1) == 1),
                  "the gradient must have the shape and dtype of x");
  check_rows(weight, x.size(0), 1, "weight");
  p.dx = dx.mutable_data_ptr();
  p.dx_stride = dx.stride(0);
  p.weight = weight.const_data_ptr<float>();
  p.kd_scale = static_cast<float>(kd_scale);
  p.ce_scale = p.labels ? static_cast<float>(ce_scale) : 0.f;
  p.ce = p.ce_scale != 0.f || (p.labels && p.metrics);
}

void over_rows(const Problem& p, int64_t rows, kd::RowRange run) {
  // A thread should have at least some 16k logits to work on.
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.vocabulary));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

Tensor row_loss(Tensor x, const Tensor& z, const std::optional<Tensor>& x_bias, const std::optional<Tensor>& z_bias,
                const std::optional<Tensor>& labels, const Tensor& weight, const Tensor& t, std::string divergence, double a,
                double temperature, double kd_scale, double ce_scale, std::vector<double> head, bool grad, bool metrics,
                std::optional<Tensor> out) {
  Problem p = problem(x, z, x_bias, z_bias, t, temperature, head, metrics);
  const int64_t rows = x.size(0);
  Tensor dx = out ? *out : x;
  set_labels(p, labels, rows);
  set_gradient(p, dx, x, weight, kd_scale, ce_scale);
  if (!grad) p.dx = nullptr;
  set_parameter(p, a);
  Tensor result = torch::stable::new_empty(x, {rows, static_cast<int64_t>(kd::row_columns)}, ScalarType::Float);
  p.rows = result.mutable_data_ptr<float>();
  over_rows(p, rows, find(divergence).row_loss);
  return result;
}

Tensor block_stats(const Tensor& x, const Tensor& z, const std::optional<Tensor>& x_bias, const std::optional<Tensor>& z_bias,
                   const std::optional<Tensor>& labels, const Tensor& t, double temperature, std::vector<double> head,
                   std::string weigh, bool ce, bool metrics) {
  Problem p = problem(x, z, x_bias, z_bias, t, temperature, head, metrics);
  STD_TORCH_CHECK(weigh.empty() || weigh == "target" || weigh == "student", "weigh is target, student or empty, got ", weigh);
  set_labels(p, labels, x.size(0));
  p.weigh = weigh.empty() ? kd::Weigh::nothing : weigh == "target" ? kd::Weigh::target : kd::Weigh::student;
  p.ce = ce;
  Tensor result = torch::stable::new_empty(x, {x.size(0), static_cast<int64_t>(kd::stats_columns)}, ScalarType::Float);
  p.stats = result.mutable_data_ptr<float>();
  over_rows(p, x.size(0), kernels().stats);
  return result;
}

Tensor block_reduce(const Tensor& x, const Tensor& z, const std::optional<Tensor>& x_bias, const std::optional<Tensor>& z_bias,
                    const Tensor& t, std::string divergence, double a, double temperature, std::vector<double> head,
                    const Tensor& stats, bool metrics) {
  Problem p = problem(x, z, x_bias, z_bias, t, temperature, head, metrics);
  const int64_t rows = x.size(0);
  check_rows(stats, rows, kd::stats_columns, "stats");
  set_parameter(p, a);
  p.stats = const_cast<float*>(stats.const_data_ptr<float>());
  Tensor result = torch::stable::new_empty(x, {rows, static_cast<int64_t>(kd::sums_columns)}, ScalarType::Float);
  p.sums = result.mutable_data_ptr<float>();
  over_rows(p, rows, find(divergence).reduce);
  return result;
}

void block_grad(Tensor x, const Tensor& z, const std::optional<Tensor>& x_bias, const std::optional<Tensor>& z_bias,
                const std::optional<Tensor>& labels, const Tensor& weight, const Tensor& t, std::string divergence, double a,
                double temperature, double kd_scale, double ce_scale, std::vector<double> head, const Tensor& stats,
                const Tensor& sums) {
  Problem p = problem(x, z, x_bias, z_bias, t, temperature, head, false);
  const int64_t rows = x.size(0);
  set_labels(p, labels, rows);
  set_gradient(p, x, x, weight, kd_scale, ce_scale);
  check_rows(stats, rows, kd::stats_columns, "stats");
  check_rows(sums, rows, kd::sums_columns, "sums");
  set_parameter(p, a);
  p.stats = const_cast<float*>(stats.const_data_ptr<float>());
  p.sums = const_cast<float*>(sums.const_data_ptr<float>());
  over_rows(p, rows, find(divergence).grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("instruction_set_names() -> str");
  m.def("use_instruction_set(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  m.impl("instruction_set_names", TORCH_BOX(&instruction_set_names));
  m.impl("use_instruction_set", TORCH_BOX(&use_instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("row_loss", TORCH_BOX(&row_loss));
  m.impl("block_stats", TORCH_BOX(&block_stats));
  m.impl("block_reduce", TORCH_BOX(&block_reduce));
  m.impl("block_grad", TORCH_BOX(&block_grad));
}

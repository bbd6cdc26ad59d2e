// A cluster of thread blocks on one thread of a CPU, and what is held against its kernel: that it ends, that no barrier is used beyond
// its rules, and that no two accesses to shared memory meet unless something orders them.
//
// Each thread is a fiber that runs until it has to wait; which one goes on, and when a copy or a send arrives, is drawn. What orders
// accesses is followed by vector clocks, as in race detectors: every thread knows of every other how much of its past lies behind what
// it does now, by the barriers, warps' and blocks', that it has passed. A shuffle passes values on, and orders nothing. Copies read
// and write through a proxy of their own: of the threads' accesses they come after those alone that were fenced (before_copies) and
// then ordered. A send is released by its thread, with all that this has behind it. So a missing barrier is found whatever the order
// in which the threads happened to run.
#include "cluster_machine.h"
#include "cluster_accesses.h"

#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace machine {
Place thread, block, grid;

namespace {

constexpr unsigned BLOCK_BYTES = 1 << 18, STACK = 1 << 16;

struct Fiber;
struct Group {  // that waits for its last
  std::vector<Fiber*> waiting;
  Past past;
  float values[2][32];
};

struct Fiber {
  unsigned block, thread;
  int index;
  Group* warp;
  Past past;
  unsigned shuffles = 0;
  bool started = false, done = false;
  jmp_buf state;
  ucontext_t first;
  std::unique_ptr<char[]> stack{new char[STACK]};
};

struct Barrier {
  int index, arrivals, pending, bytes = 0;
  unsigned phase = 0;
  bool sent = false;
  Past now, passed;
  std::vector<Fiber*> waiting;
};

struct Transfer {
  unsigned to, barrier;
  int bytes;
  const void* from;  // nothing: values
  float4 values;
  Past past{};
};

struct Cluster {
  Launch launch;
  std::mt19937 random;
  bool checked;
  unsigned late, first_block = 0;
  std::vector<char> memory;
  Words words;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready;
  std::vector<Transfer> under_way;
  std::map<unsigned, Barrier> barriers;
  std::vector<Group> warps, blocks;
  Group all;
  std::size_t actors;
  std::vector<unsigned> running;  // threads of each block
};

Cluster* cluster;
Fiber* current;
jmp_buf scheduler;
std::string wrong;
const std::function<void()>* body;

void leave() {
  if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}

}  // namespace

void fail(const std::string& what) {
  if (wrong.empty()) wrong = what;
}

std::string name(int who) {
  const int threads = static_cast<int>(cluster->fibers.size());
  if (who >= threads) return "a transfer of barrier " + std::to_string(who - threads);
  const Fiber& f = *cluster->fibers[who];
  return "thread " + std::to_string(f.thread) + " of block " + std::to_string(f.block);
}

std::string place(unsigned address) {
  const unsigned at = address % BLOCK_BYTES, slices = cluster->launch.slices;
  const bool in_slices = at < slices;
  return (in_slices ? "float " : "byte ") + std::to_string(in_slices ? at / 4 : at - slices) +
         (in_slices ? " of the slices" : " of Shared") + " of block " + std::to_string(address / BLOCK_BYTES);
}

namespace {

// This thread's past goes to others; what it does from now on is not in it.
void publish(Past& to) {
  if (!cluster->checked) return;
  to.join(current->past);
  current->past.all[current->index]++;
}

Past nothing() { return {Clock(cluster->checked ? cluster->actors : 0), Clock(cluster->checked ? cluster->actors : 0)}; }

void meet(Group& group, std::size_t size, bool orders) {
  if (orders) publish(group.past);
  group.waiting.push_back(current);
  if (group.waiting.size() == size) {
    for (Fiber* one : group.waiting) {
      if (orders && cluster->checked) one->past.join(group.past);
      cluster->ready.push_back(one);
    }
    group.waiting.clear();
    if (orders) group.past = nothing();
  }
  leave();
}

Barrier& barrier_at(unsigned address) {
  const auto found = cluster->barriers.find(address);
  if (found != cluster->barriers.end()) return found->second;
  fail(place(address) + " is used as a barrier and was not set up");
  leave();
  __builtin_unreachable();
}

void move_on(Barrier& b) {
  if (b.pending || b.bytes) return;
  b.phase++;
  b.pending = b.arrivals;
  b.passed = b.now;
  b.now = nothing();
  for (Fiber* one : b.waiting) cluster->ready.push_back(one);
  b.waiting.clear();
}

void start(const Transfer& transfer, const Clock& past) {
  if (transfer.to % 16 || transfer.bytes % 16 || transfer.bytes <= 0 || reinterpret_cast<std::uintptr_t>(transfer.from) % 16)
    fail("a transfer to " + place(transfer.to) + " is not of multiples of 16 bytes");
  if (cluster->checked)
    for (unsigned at = transfer.to; at < transfer.to + transfer.bytes; at += 4) {
      cluster->words.touch(at, current->index, 0, past, true);
      cluster->words[at / 4].awaited = true;
    }
  std::memset(&cluster->memory[transfer.to], 0xFF, transfer.bytes);  // NaN until it arrives
  cluster->under_way.push_back(transfer);
}

void land(const Transfer& transfer) {
  if (!cluster->running[transfer.to / BLOCK_BYTES]) fail("a transfer to " + place(transfer.to) + " arrives when the block has ended");
  std::memcpy(&cluster->memory[transfer.to], transfer.from ? transfer.from : &transfer.values, transfer.bytes);
  Barrier& b = barrier_at(transfer.barrier);
  if (cluster->checked) {
    const int who = static_cast<int>(cluster->fibers.size()) + b.index;
    for (unsigned at = transfer.to; at < transfer.to + transfer.bytes; at += 4)
      cluster->words[at / 4] = {{who, b.phase + 1}, {}, false};
    b.now.all[who] = b.now.fenced[who] = b.phase + 1;
    b.now.join(transfer.past);
  }
  b.bytes -= transfer.bytes;
  b.sent |= !transfer.from;
  move_on(b);
}

void begin() {
  (*body)();
  cluster->running[current->block]--;
  current->done = true;
  leave();
}

void resume(Fiber& fiber) {
  current = &fiber;
  thread = {fiber.thread};
  block = {cluster->first_block + fiber.block};
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.first);
}

template <class T>
T drawn(std::vector<T>& from) {
  std::swap(from[cluster->random() % from.size()], from.back());
  const T one = from.back();
  from.pop_back();
  return one;
}

// The blocks that are drawn to be fast go first, mostly, so that they run ahead of the others.
Fiber& next() {
  std::vector<Fiber*>& ready = cluster->ready;
  std::size_t best = cluster->random() % ready.size();
  if (cluster->late % 2)
    for (int more = 0; more < 3; more++) {
      const std::size_t other = cluster->random() % ready.size();
      const auto slowness = [&](std::size_t at) { return (ready[at]->block + cluster->late) * 2654435761u >> 16 & 0xFF; };
      if (slowness(other) < slowness(best)) best = other;
    }
  std::swap(ready[best], ready.back());
  Fiber& one = *ready.back();
  ready.pop_back();
  return one;
}

void run_cluster() {
  static const unsigned PATIENCE[] = {1, 4, 64, 1u << 30};
  const unsigned patience = PATIENCE[cluster->late / 2 % 4];
  while (wrong.empty()) {
    std::vector<Transfer>& under_way = cluster->under_way;
    if (!under_way.empty() && (cluster->ready.empty() || cluster->random() % patience == 0))
      land(drawn(under_way));
    else if (!cluster->ready.empty())
      resume(next());
    else
      break;
  }
  for (const auto& fiber : cluster->fibers)
    if (!fiber->done) fail("thread " + std::to_string(fiber->thread) + " of block " + std::to_string(fiber->block) + " waits forever");
  for (const auto& [address, b] : cluster->barriers)
      if (b.bytes) fail(place(address) + " still expects bytes at the end");
}

void make(unsigned blocks, unsigned threads) {
  constexpr unsigned MOST_BARRIERS = 128;  // of a block
  cluster->actors = blocks * (threads + MOST_BARRIERS);
  cluster->running.assign(blocks, threads);
  cluster->warps = std::vector<Group>(blocks * threads / 32);
  cluster->blocks = std::vector<Group>(blocks);
  for (auto* groups : {&cluster->warps, &cluster->blocks})
    for (Group& one : *groups) one.past = nothing();
  cluster->all.past = nothing();
  cluster->memory.assign(blocks * BLOCK_BYTES, static_cast<char>(0xFF));
  if (cluster->checked) cluster->words.assign(blocks * BLOCK_BYTES / 4, Word());
  for (unsigned at = 0; at < blocks * threads; at++) {
    cluster->fibers.emplace_back(new Fiber);
    Fiber& fiber = *cluster->fibers.back();
    fiber.block = at / threads, fiber.thread = at % threads, fiber.index = at, fiber.warp = &cluster->warps[at / 32];
    fiber.past = nothing();
    if (cluster->checked) fiber.past.all[at] = 1;
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.get();
    fiber.first.uc_stack.ss_size = STACK;
    makecontext(&fiber.first, begin, 0);
    cluster->ready.push_back(&fiber);
  }
}

}  // namespace

const char* run(const Launch& launch, const std::function<void()>& kernel, unsigned seed, bool checked) {
  wrong.clear();
  body = &kernel;
  grid = {launch.grid};
  for (unsigned first = 0; first < launch.grid && wrong.empty(); first += launch.cluster) {
    Cluster one{launch, std::mt19937(seed + first), checked, seed % 16, first, {}, {}, {}, {}, {}, {}, {}, {}, {}, 0, {}};
    cluster = &one;
    make(launch.cluster, launch.threads);
    run_cluster();
  }
  cluster = nullptr;
  return wrong.c_str();
}

unsigned address(const void* place) { return static_cast<unsigned>(static_cast<const char*>(place) - cluster->memory.data()); }
unsigned in_block(unsigned place, int block) { return place % BLOCK_BYTES + block * BLOCK_BYTES; }
void* slices() { return &cluster->memory[current->block * BLOCK_BYTES]; }
void* shared_by_block() { return static_cast<char*>(slices()) + cluster->launch.slices; }

void set_up(unsigned address, int arrivals) {
  const int index = static_cast<int>(cluster->barriers.size());
  cluster->barriers[address] = {index, arrivals, arrivals, 0, 0, false, nothing(), nothing(), {}};
}

void arrive(unsigned address, int bytes) {
  Barrier& b = barrier_at(address);
  if (b.pending == 0) fail(place(address) + " gets more arrivals than it was set up for");
  publish(b.now);
  b.bytes += bytes;
  b.pending--;
  move_on(b);
}

void await(unsigned address, int parity, bool sent) {
  Barrier& b = barrier_at(address);
  while (static_cast<int>(b.phase & 1) == parity) {
    b.waiting.push_back(current);
    leave();
  }
  if (b.sent && !sent) fail(place(address) + " is of sends, which an acquire of this block alone does not order");
  if (cluster->checked) current->past.join(b.passed);
}

void copy(unsigned to, const void* from, int bytes, unsigned barrier) {
  start({to, barrier, bytes, from, {}}, current->past.fenced);
}

void send(unsigned to, float4 values, unsigned barrier) {
  Past past = nothing();
  const Clock before = current->past.all;
  publish(past);
  start({to, barrier, 16, nullptr, values, past}, before);
}

void warp_together() { meet(*current->warp, 32, true); }
void together() { meet(cluster->blocks[current->block], cluster->launch.threads - 32, true); }
void cluster_together() { meet(cluster->all, cluster->fibers.size(), true); }

void before_copies() {
  if (!cluster->checked) return;
  join(current->past.fenced, current->past.all);
  current->past.all[current->index]++;
}

float of_lane(float v, int lane) {
  float* values = current->warp->values[current->shuffles++ % 2];
  values[current->thread % 32] = v;
  meet(*current->warp, 32, false);
  return values[lane];
}

}  // namespace machine

namespace {

void announced(const void* place, unsigned bytes, bool writes) {
  using namespace machine;
  if (!cluster || !cluster->checked) return;
  const char *at = static_cast<const char*>(place), *begin = cluster->memory.data();
  if (at < begin || at >= begin + cluster->memory.size()) return;
  for (unsigned word = address(place) & ~3u; word < address(place) + bytes; word += 4)
    cluster->words.touch(word, current->index, current->past.all[current->index], current->past.all, writes);
}

}  // namespace

// What a compiler calls in code for ThreadSanitizer.
extern "C" {
#define KD_ANNOUNCED(SIZE)                                                    \
  void __tsan_read##SIZE(void* at) { announced(at, SIZE, false); }            \
  void __tsan_write##SIZE(void* at) { announced(at, SIZE, true); }            \
  void __tsan_unaligned_read##SIZE(void* at) { announced(at, SIZE, false); }  \
  void __tsan_unaligned_write##SIZE(void* at) { announced(at, SIZE, true); }
KD_ANNOUNCED(1)
KD_ANNOUNCED(2)
KD_ANNOUNCED(4)
KD_ANNOUNCED(8)
KD_ANNOUNCED(16)
void __tsan_read_range(void* at, unsigned long bytes) { announced(at, static_cast<unsigned>(bytes), false); }
void __tsan_write_range(void* at, unsigned long bytes) { announced(at, static_cast<unsigned>(bytes), true); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}
}

#include "hopper.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

Index threadIdx, blockIdx, gridDim;

namespace {

constexpr int CLUSTER = 2;
constexpr std::size_t STACK = 1 << 16;
enum Kind { PRODUCT, LOAD, STORE };

struct Fiber {
  ucontext_t first;
  jmp_buf state;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool started = false, over = false;
  int thread = 0, block = 0;
  std::function<bool()> waits;                // for what; nothing while it runs
  std::shared_ptr<int> group;                 // products since the last commit: how many are not done
  std::vector<std::shared_ptr<int>> groups;   // committed
  std::vector<unsigned> unshown;              // places of 16 bytes that it wrote and that copies may not see yet
  std::vector<std::shared_ptr<bool>> stores;  // whether each has read shared memory
};
struct Barrier {
  int count, pending, bytes, phase;
};
struct Meeting {  // of a warp
  int come = 0, round = 0;
  unsigned given[32], taken[32], places[32];
  std::array<unsigned, 4> v[32];
};
struct Product {  // of a warp; d and group of each lane
  u64 a, b;
  int add, come = 0;
  float* d[32] = {};
  std::shared_ptr<int> group[32];
};
struct Block {
  unsigned running;  // threads
  std::vector<char> memory;
  std::vector<bool> unshown;  // of every 16 bytes
  std::map<unsigned, Barrier> barriers;
  std::vector<Meeting> warps;
  std::vector<std::deque<std::shared_ptr<Product>>> products;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Block> blocks;
std::vector<std::pair<Kind, std::function<void()>>> events;
Fiber* me;
jmp_buf scheduler;
std::mt19937 dice;
std::string wrong;
u64 progress;
int met, meetings, threads_of_block;
bool is_bfloat16;
const std::function<void()>* body;

Block& mine() { return blocks[me->block]; }
Meeting& warp() { return mine().warps[me->thread / 32]; }
void leave() {
  if (!_setjmp(me->state)) _longjmp(scheduler, 1);
}
void require(bool holds, const char* what) {
  if (holds) return;
  if (wrong.empty())
    wrong = what + (me ? " (block " + std::to_string(me->block) + ", thread " + std::to_string(me->thread) + ")" : std::string());
  if (me) leave();  // for good
}
template <class F>
void until(F holds) {
  if (!holds()) {
    me->waits = holds;
    leave();
  }
  progress++;
}

Barrier& barrier_of(int block, unsigned at) {
  static Barrier none;
  require(blocks[block].running, "a barrier of a block that has ended");
  const auto found = blocks[block].barriers.find(at);
  require(found != blocks[block].barriers.end(), "a barrier that was not set up");
  return found == blocks[block].barriers.end() ? none : found->second;
}
void settle(Barrier& b) {
  if (!b.pending && !b.bytes) b.phase ^= 1, b.pending = b.count;
  progress++;
}
void arrive(int block, unsigned at, int bytes) {
  Barrier& b = barrier_of(block, at);
  require(b.pending > 0, "more arrivals than a barrier takes");
  b.bytes += bytes, b.pending--;
  settle(b);
}

// 16-byte places of 128-byte rows, exchanged over groups of 8 rows.
unsigned swizzled(unsigned place) { return place ^ (place >> 7 & 7) << 4; }
// Null outside of the tensor.
char* entry(const Map& map, int row, int column) {
  const bool inside = row >= 0 && column >= 0 && (u64)row < map.rows && (u64)column < map.columns;
  return inside ? map.data + row * map.stride + column * 2 : nullptr;
}
void bring(int block, unsigned to, const Map& map, int column, int row, unsigned barrier) {
  require(to % 1024 == 0, "a tile that does not begin where its swizzle does");
  events.emplace_back(LOAD, [=] {
    Block& in = blocks[block];
    const unsigned row_bytes = map.box_columns * 2;
    for (unsigned r = 0; r < map.box_rows; r++)
      for (unsigned c = 0; c < map.box_columns; c++) {
        const unsigned place = swizzled(to + r * row_bytes + c * 2);
        require(!in.unshown[place / 16], "a copy over what was written and not shown to it");
        if (const char* from = entry(map, row + r, column + c))
          memcpy(&in.memory[place], from, 2);
        else
          memset(&in.memory[place], 0, 2);
      }
    Barrier& b = barrier_of(block, barrier);
    b.bytes -= map.box_rows * row_bytes;
    settle(b);
  });
}
int other(int rank) { return me->block / CLUSTER * CLUSTER + rank; }

float operand(const Block& in, u64 described, int row, int k) {
  const unsigned start = (described & 0x3fff) << 4, groups = (described >> 32 & 0x3fff) << 4;
  const char* at = &in.memory[swizzled(start + row / 8 * groups + row % 8 * 128 + k * 2)];
  if (is_bfloat16) {
    uint16_t bits;
    memcpy(&bits, at, 2);
    return __int_as_float((unsigned)bits << 16);
  }
  _Float16 v;
  memcpy(&v, at, 2);
  return v;
}
// The oldest of a warp: a warp's are done in order, those of the four warps of a group in any.
void multiply_now(int block, int of) {
  Block& in = blocks[block];
  const auto q = in.products[of].front();
  in.products[of].pop_front();
  static float A[16][16], B[16][256], sums[16][256];
  for (int k = 0; k < 16; k++) {
    for (int r = 0; r < 16; r++) A[r][k] = operand(in, q->a, of % 4 * 16 + r, k);
    for (int c = 0; c < 256; c++) B[k][c] = operand(in, q->b, c, k);
  }
  for (int r = 0; r < 16; r++) {
    std::fill(sums[r], sums[r] + 256, 0.0f);
    for (int k = 0; k < 16; k++)
      for (int c = 0; c < 256; c++) sums[r][c] += A[r][k] * B[k][c];
  }
  for (int l = 0; l < 32; l++) {
    for (int i = 0; i < 128; i++) {
      float& to = q->d[l][i];
      to = (q->add ? to : 0) + sums[l / 4 + i / 2 % 2 * 8][i / 4 * 8 + l % 4 * 2 + i % 2];
    }
    --*q->group[l];
  }
  progress++;
}

template <class Put, class All>
void meet(Put put, All all) {  // lanes of a warp: each puts, the last one does all
  Meeting& m = warp();
  const int round = m.round;
  put(m, me->thread % 32);
  if (++m.come == 32) all(m), m.come = 0, m.round++;
  until([&m, round] { return m.round != round; });
}

// Whether all but the last ones are done.
template <class Done, class T>
bool all_but(int pending, const std::vector<std::shared_ptr<T>>& of, Done done) {
  const std::size_t held = std::min<std::size_t>(pending, of.size());
  return std::all_of(of.begin(), of.end() - held, [&](const auto& one) { return done(*one); });
}

void begin() {
  (*body)();
  require(all_but(0, me->stores, [](bool read) { return read; }), "a thread ends while a store reads what it wrote");
  me->over = true;
  mine().running--;
  progress++;
  leave();
}
void resume(Fiber& f) {
  me = &f;
  threadIdx.x = f.thread, blockIdx.x = f.block;
  if (!_setjmp(scheduler)) {
    if (f.started) _longjmp(f.state, 1);
    f.started = true;
    setcontext(&f.first);
  }
  me = nullptr;
}

// One of the events, of the kind ``late`` only where nothing else can happen.
void happen(int late, bool stuck) {
  std::size_t at = dice() % events.size();
  if (events[at].first == late) {
    const auto found = std::find_if(events.begin(), events.end(), [&](const auto& one) { return one.first != late; });
    if (found != events.end())
      at = found - events.begin();
    else if (!stuck)
      return;
  }
  const auto event = std::move(events[at].second);
  events.erase(events.begin() + at);
  event();
}

}  // namespace

const char* run(unsigned grid, unsigned threads, unsigned shared, unsigned seed, bool of_bfloat16,
                const std::function<void()>& kernel) {
  fibers.clear(), events.clear(), blocks.assign(grid, Block()), wrong.clear();
  dice.seed(seed), met = meetings = 0, threads_of_block = threads, gridDim.x = grid, is_bfloat16 = of_bfloat16, body = &kernel;
  for (auto& b : blocks) {
    b.memory.assign(shared, 0x7f), b.unshown.assign(shared / 16, false);  // 0x7f7f: near the largest number, or NaN
    b.running = threads, b.warps.resize(threads / 32), b.products.resize(threads / 32);
  }
  for (unsigned i = 0; i < grid * threads; i++) {
    fibers.emplace_back(new Fiber);
    Fiber& f = *fibers.back();
    f.thread = i % threads, f.block = i / threads;
    getcontext(&f.first);
    f.first.uc_stack.ss_sp = f.stack.get(), f.first.uc_stack.ss_size = STACK;
    makecontext(&f.first, begin, 0);
  }
  std::vector<Fiber*> order;
  for (auto& f : fibers) order.push_back(f.get());
  const int late = static_cast<int>(dice() % 4) - 1;
  const bool lazy = dice() % 2;  // events one at a time, now and then, or all at once
  u64 before = progress - 1;
  for (int idle = 0; wrong.empty() && !order.empty();) {
    const bool stuck = progress == before;
    before = progress;
    std::shuffle(order.begin(), order.end(), dice);
    for (Fiber* f : order) {
      if (dice() % 4 == 0 || (f->waits && !f->waits())) continue;
      f->waits = nullptr;
      resume(*f);
      if (!wrong.empty()) break;
    }
    order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->over; }), order.end());
    const std::size_t some = dice() % 8 == 0 || stuck ? 1 : 0;
    for (std::size_t n = std::min(events.size(), lazy ? some : events.size()); n && wrong.empty(); n--) happen(late, stuck);
    idle = progress == before ? idle + 1 : 0;
    require(idle < 200, "threads wait for ever");
  }
  while (wrong.empty() && !events.empty()) happen(-1, true);
  for (auto& b : blocks)
    for (const auto& [_, barrier] : b.barriers) require(!barrier.bytes, "a barrier still expects bytes at the end");
  return wrong.c_str();
}

unsigned shared_memory() { return 0; }
void set_up(unsigned barrier, int arrivals) { mine().barriers[barrier] = {arrivals, arrivals, 0, 0}; }
void expect(unsigned barrier, int bytes) { arrive(me->block, barrier, bytes); }
void arrive_in(unsigned barrier, int rank) { arrive(other(rank), barrier, 0); }
void await(unsigned barrier, int parity) {
  const Barrier& b = barrier_of(me->block, barrier);
  until([&b, parity] { return b.phase != parity; });
}
void cluster_together() {  // of all clusters
  const int round = meetings;
  if (++met == static_cast<int>(fibers.size())) met = 0, meetings++;
  until([round] { return meetings != round; });
}

void load(unsigned to, const Map* map, int column, int row, unsigned barrier) { bring(me->block, to, *map, column, row, barrier); }
void load_for_both(unsigned to, const Map* map, int column, int row, unsigned barrier) {
  for (int rank = 0; rank < CLUSTER; rank++) bring(other(rank), to, *map, column, row, barrier);
}
void store(const Map* map, unsigned from, int column, int row) {
  const unsigned row_bytes = map->box_columns * 2;
  require(from % 1024 == 0, "a box that does not begin where its swizzle does");
  for (unsigned i = 0; i < map->box_rows * row_bytes; i += 16)
    require(!mine().unshown[(from + i) / 16], "a store of what its writers have not shown to copies");
  const auto read = std::make_shared<bool>(false);
  me->stores.push_back(read);
  events.emplace_back(STORE, [m = *map, block = me->block, from, row_bytes, column, row, read] {
    for (unsigned r = 0; r < m.box_rows; r++)
      for (unsigned c = 0; c < m.box_columns; c++)
        if (char* to = entry(m, row + r, column + c)) memcpy(to, &blocks[block].memory[swizzled(from + r * row_bytes + c * 2)], 2);
    *read = true;
    progress++;
  });
}
void wait_for_stores(int pending) {
  until([f = me, pending] { return all_but(pending, f->stores, [](bool read) { return read; }); });
}
void show_to_copies() {
  for (unsigned place : me->unshown) mine().unshown[place / 16] = false;
  me->unshown.clear();
}

void multiply(float (&d)[128], u64 a, u64 b, int add) {
  require(a >> 62 == 1 && b >> 62 == 1, "an operand that is not swizzled over 128 bytes");
  const int of = me->thread / 32, lane = me->thread % 32;
  if (!me->group) me->group = std::make_shared<int>(0);
  ++*me->group;
  auto& queue = mine().products[of];
  std::shared_ptr<Product> p;
  for (auto& one : queue)
    if (!one->d[lane]) {
      p = one;
      break;
    }
  if (!p) {
    p = std::make_shared<Product>();
    p->a = a, p->b = b, p->add = add;
    queue.push_back(p);
  }
  require(p->a == a && p->b == b && p->add == add, "lanes of a warp multiply different things");
  p->d[lane] = d, p->group[lane] = me->group;
  if (++p->come == 32) events.emplace_back(PRODUCT, [block = me->block, of] { multiply_now(block, of); });
}
void commit() {
  me->groups.push_back(me->group ? me->group : std::make_shared<int>(0));
  me->group.reset();
}
void wait_for_products(int pending) {
  until([f = me, pending] { return all_but(pending, f->groups, [](int left) { return left == 0; }); });
}

void __syncwarp() {
  meet([](Meeting&, int) {}, [](Meeting&) {});
}
float of_partner(float v, int mask) {
  meet([v](Meeting& m, int l) { memcpy(&m.given[l], &v, 4); },
       [mask](Meeting& m) {
         for (int l = 0; l < 32; l++) m.taken[l] = m.given[l ^ mask];
       });
  return __int_as_float(warp().taken[me->thread % 32]);
}
void write_blocks(unsigned place, const unsigned (&v)[4]) {
  meet([place, &v](Meeting& m, int l) { m.places[l] = place, memcpy(m.v[l].data(), v, 16); },
       [](Meeting& m) {
         Block& in = mine();
         const auto first = &fibers[me->block * threads_of_block + me->thread / 32 * 32];
         for (int i = 0; i < 32; i++) {  // row i % 8 of block i / 8
           for (int c = 0; c < 4; c++) memcpy(&in.memory[m.places[i] + c * 4], &m.v[i % 8 * 4 + c][i / 8], 4);
           in.unshown[m.places[i] / 16] = true;
           first[i]->unshown.push_back(m.places[i]);
         }
       });
}

extern "C" int cuTensorMapEncodeTiled(Map* map, int type, unsigned rank, void* address, const u64* sizes, const u64* strides,
                                      const unsigned* box, const unsigned* steps, int interleave, int swizzle, int, int fill) {
  const bool right = (reinterpret_cast<uintptr_t>(map) % 64 == 0) && (type == 6 || type == 9) && rank == 2 &&
                     reinterpret_cast<uintptr_t>(address) % 16 == 0 && strides[0] % 16 == 0 && strides[0] >= sizes[0] * 2 &&
                     box[0] * 2 == 128 && box[1] <= 256 && steps[0] == 1 && steps[1] == 1 && !interleave && swizzle == 3 && !fill;
  if (!right) return 1;
  *map = {static_cast<char*>(address), sizes[0], sizes[1], strides[0], box[0], box[1], type == 9, {}};
  return 0;
}

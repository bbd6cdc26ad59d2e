// The shared memory of cluster_machine.cpp's cluster, word by word: who read and wrote each, and whether something orders an access
// behind those. What is ordered is told by vector clocks, as in race detectors; the machine moves them on.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace machine {

constexpr int NOBODY = -1;

typedef std::vector<unsigned> Clock;

inline void join(Clock& to, const Clock& from) {
  for (std::size_t k = 0; k < from.size(); k++) to[k] = std::max(to[k], from[k]);
}

// What comes before: of everything, and of what is fenced for copies.
struct Past {
  Clock all, fenced;
  void join(const Past& from) {
    machine::join(all, from.all);
    machine::join(fenced, from.fenced);
  }
};

struct Access {
  int who;
  unsigned when;
};

struct Word {
  Access written{NOBODY, 0};
  std::vector<Access> read;
  bool awaited = false;  // from a transfer under way
};

// What the machine calls an actor (a thread, or the transfers of a barrier) and an address; and where a fault is told.
std::string name(int who);
std::string place(unsigned address);
void fail(const std::string& what);

// All words of a cluster's shared memory.
struct Words : std::vector<Word> {
  using std::vector<Word>::vector;

  static void hold(const Access& before, const Clock& past, unsigned address, int who, const char* did, const char* does) {
    if (before.who != NOBODY && before.who != who && before.when > past[before.who])
      fail(name(who) + does + place(address) + ", which " + name(before.who) + did + ": nothing orders them");
  }

  // An access to a word by ``who`` behind ``past``, its own time ``when``.
  void touch(unsigned address, int who, unsigned when, const Clock& past, bool writes) {
    Word& word = (*this)[address / 4];
    if (word.awaited) fail(name(who) + (writes ? " writes " : " reads ") + place(address) + " while a transfer to it is under way");
    hold(word.written, past, address, who, " wrote", writes ? " writes " : " reads ");
    if (writes) {
      for (const Access& one : word.read) hold(one, past, address, who, " read", " writes ");
      word.read.clear();
      word.written = {who, when};
    } else {
      for (Access& one : word.read)
        if (one.who == who) {
          one.when = when;
          return;
        }
      word.read.push_back({who, when});
    }
  }
};

}  // namespace machine

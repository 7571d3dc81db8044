// Threads that wait for each other.
#include <cstring>

#include "block.h"

namespace diffit::emulation {
namespace {

bool same(Location a, Location b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

Meeting& meeting(int first, int count) {
  if (count == 32) return block.warps[first / 32];
  return block.groups[{first, count}];
}

}  // namespace

void** detail::meet(int first, int count, const char* name, void* payload, Location where) {
  Meeting& here = meeting(first, count);
  if (here.arrived == 0) {
    here.name = name;
    here.where = where;
    here.first_to_arrive = block.running;
    here.payloads.resize(count);
  } else if (std::strcmp(here.name, name) != 0 || !same(here.where, where)) {
    fail(std::string(name) + " must be met by all " + std::to_string(count) + " threads from " +
             std::to_string(first) + " on; but thread " + std::to_string(here.first_to_arrive) +
             " waits for " + text(here.name, here.where),
         where);
  }
  here.payloads[block.running - first] = payload;
  if (++here.arrived == count) return here.payloads.data();
  wait(name, where);
  return nullptr;
}

void detail::part(int first, int count) {
  meeting(first, count).arrived = 0;
  for (int i = first; i < first + count; ++i) make_ready(i);
  take_turns();
}

void barrier(int id, int threads, Location where) {
  static const char* const kNames[16] = {"__syncthreads", "barrier 1",  "barrier 2",  "barrier 3",
                                         "barrier 4",     "barrier 5",  "barrier 6",  "barrier 7",
                                         "barrier 8",     "barrier 9",  "barrier 10", "barrier 11",
                                         "barrier 12",    "barrier 13", "barrier 14", "barrier 15"};
  if (id < 0 || id > 15) fail("barrier " + std::to_string(id) + "; they are 0 to 15", where);
  const char* name = kNames[id];
  if (threads < 32 || threads > block.launch->threads || threads % 32 != 0) {
    fail(std::string(name) + " of " + std::to_string(threads) + " threads, in a block of " +
             std::to_string(block.launch->threads) + "; it must be whole warps",
         where);
  }
  int payload = 0;  // the processor counts warps: their lanes come together
  warp_collective(name, payload, [](Payloads<int>) {}, where);
  Barrier& here = block.barriers[id];
  if (here.waiting.empty()) {
    here.threads = threads;
    here.where = where;
  } else if (here.threads != threads) {
    fail(std::string(name) + " of " + std::to_string(threads) + " threads; but thread " +
             std::to_string(here.waiting[0]) + " waits for " + std::to_string(here.threads) +
             " of them, for " + text(name, here.where),
         where);
  } else if (id == 0 && !same(here.where, where)) {
    fail("thread " + std::to_string(here.waiting[0]) + " waits for another " +
             text(name, here.where),
         where);
  }
  here.waiting.push_back(block.running);
  if (int(here.waiting.size()) < threads) {
    wait(name, where);
  } else {
    for (int thread : here.waiting) make_ready(thread);
    here.waiting.clear();
    take_turns();
  }
}

void block_until(const std::function<bool()>& ready, const std::string& description,
                 Location where) {
  while (!ready()) {  // it may have been so for a while, before this thread's turn
    block.threads[block.running].condition = &ready;
    wait(description.c_str(), where);
  }
}

void state_changed() { block.changed = true; }

void asynchronously(const std::string& description, std::function<void()> action, Location where) {
  block.events.push_back({text(description.c_str(), where), std::move(action)});
}

}  // namespace diffit::emulation

// The block that runs, as turns.cpp, meetings.cpp and device.cpp share it.
#pragma once

#include <deque>
#include <exception>
#include <random>
#include <utility>

#include "device.h"

namespace diffit::emulation {

constexpr int kWarps = 32;  // 1024 threads

enum class Order { kAscending, kDescending, kRandom };

struct Thread {
  enum { kNew, kRunning, kWaiting, kDone } state = kNew;
  const char* waits_for;  // if it waits, and where
  Location where;
  const std::function<bool()>* condition = nullptr;  // of block_until
  detail::Slots slots;
};

// Threads that have come together, or some of them so far.
struct Meeting {
  int arrived = 0;
  int first_to_arrive;
  const char* name;
  Location where;
  std::vector<void*> payloads;
};

struct Barrier {
  int threads = 0;
  Location where;
  std::vector<int> waiting;
};

struct Event {
  std::string description;
  std::function<void()> action;
};

// The block that runs. There is one at a time in a process.
struct Block {
  const Launch* launch = nullptr;
  const std::function<void()>* kernel;
  Statistics* statistics;
  Order order;
  std::mt19937 random;

  int running = -1;  // a thread, or -1: the launch itself
  std::vector<Thread> threads;
  uint32_t ready[kWarps], ready_warps;  // bits of lanes, and of warps that have any
  Meeting warps[kWarps];
  std::map<std::pair<int, int>, Meeting> groups;  // by first thread and count
  Barrier barriers[16];
  std::deque<Event> events;
  detail::Slots slots;
  bool changed;                // state_changed() since the conditions were last asked for
  std::exception_ptr failure;  // the first one
  bool cancelled;              // there was a failure: whoever waits unwinds its stack

  unsigned char* shared = nullptr;
};
extern Block block;

// In turns.cpp:

void read_order();  // from the environment
void run_block();   // and throws what went wrong

// For the thread that runs: until someone makes it ready. The text must live as long.
void wait(const char* for_what, Location where);
void make_ready(int thread);
void take_turns();  // it is ready, but others may be first

// Words for errors:

std::string text(Location where);                    // "x.cu:88"
std::string text(const char* what, Location where);  // "<what> at x.cu:88"
std::string block_text();                            // "<kernel>, block (0, 0, 0)"
std::string thread_text();                           // and ", thread 37 (warp 1, lane 5)"

}  // namespace diffit::emulation

// Whose turn it is.
#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "block.h"
#include "emulation.h"
#include "fiber.h"

namespace diffit::emulation {
namespace {

// Kept from block to block, and from launch to launch.
Fiber launcher;
std::vector<std::unique_ptr<Fiber>> fibers;

// Unwinds the stack of a thread whose block has failed.
struct Cancelled {};

// The bit that is next in the order, of some.
int choose(uint32_t bits) {
  if (block.order == Order::kAscending) return std::countr_zero(bits);
  if (block.order == Order::kDescending) return std::bit_width(bits) - 1;
  for (int skip = block.random() % std::popcount(bits); skip > 0; --skip) bits &= bits - 1;
  return std::countr_zero(bits);
}

void ask_conditions() {
  block.changed = false;
  for (size_t i = 0; i < block.threads.size(); ++i) {
    Thread& thread = block.threads[i];
    if (thread.state == Thread::kWaiting && thread.condition != nullptr && (*thread.condition)()) {
      thread.condition = nullptr;
      make_ready(i);
    }
  }
}

void run_event(size_t index) {
  Event event = std::move(block.events[index]);
  block.events.erase(block.events.begin() + index);
  event.action();
  block.changed = true;
}

// "threads 0-31, 40: wait at ..." by what they wait for.
std::string deadlock() {
  std::map<std::string, std::string> lists;  // of threads
  const int count = block.threads.size();
  auto state = [](int i) {
    const Thread& thread = block.threads[i];
    if (thread.state == Thread::kDone) return std::string("have returned");
    return "wait for " + text(thread.waits_for, thread.where);
  };
  for (int begin = 0, end; begin < count; begin = end) {
    for (end = begin + 1; end < count && state(end) == state(begin);) ++end;
    std::string& list = lists[state(begin)];
    if (!list.empty()) list += ", ";
    list += std::to_string(begin);
    if (end - begin > 1) list += "-" + std::to_string(end - 1);
  }
  std::string message = "deadlock, no thread can go on";
  for (const auto& [what, list] : lists) message += "\n  threads " + list + " " + what;
  return message;
}

bool has_ended() {
  return std::all_of(block.threads.begin(), block.threads.end(),
                     [](const Thread& thread) { return thread.state == Thread::kDone; });
}

// Makes threads ready, as the order has it. Throws if the block cannot go on, and makes none ready
// if it has ended.
void find_ready() {
  while (!block.events.empty() && (block.order == Order::kDescending ||
                                   (block.order == Order::kRandom && block.random() % 4 == 0))) {
    run_event(block.order == Order::kRandom ? block.random() % block.events.size() : 0);
  }
  if (block.changed) ask_conditions();
  if (block.ready_warps == 0 && has_ended()) {
    if (block.events.empty()) return;
    throw std::runtime_error(block_text() +
                             ": ended before this was done: " + block.events.front().description);
  }
  while (block.ready_warps == 0) {
    const bool any = !block.events.empty();
    if (any) run_event(0);
    ask_conditions();
    if (!any && block.ready_warps == 0) throw std::runtime_error(block_text() + ": " + deadlock());
  }
}

// Who runs next; null if the block has ended, one way or the other.
Fiber* next() {
  try {
    if (block.failure == nullptr) find_ready();
  } catch (...) {
    block.failure = std::current_exception();
  }
  if (block.failure != nullptr || block.ready_warps == 0) return nullptr;
  const int warp = choose(block.ready_warps), lane = choose(block.ready[warp]);
  block.ready[warp] &= ~(1u << lane);
  if (block.ready[warp] == 0) block.ready_warps &= ~(1u << warp);
  block.running = warp * 32 + lane;
  block.threads[block.running].state = Thread::kRunning;
  threadIdx = {unsigned(block.running), 0, 0};
  return fibers[block.running].get();
}

}  // namespace

void read_order() {
  const char* variable = std::getenv("DIFFIT_EMULATION_ORDER");
  const std::string value = variable != nullptr ? variable : "ascending";
  if (value == "ascending") {
    block.order = Order::kAscending;
  } else if (value == "descending") {
    block.order = Order::kDescending;
  } else if (value.starts_with("random:")) {
    block.order = Order::kRandom;
    block.random.seed(std::atoi(value.c_str() + 7));
  } else {
    throw std::runtime_error(
        "DIFFIT_EMULATION_ORDER is ascending, descending or random:<seed>, not " + value);
  }
}

void make_ready(int thread) {
  block.ready[thread / 32] |= 1u << thread % 32;
  block.ready_warps |= 1u << thread / 32;
}

// The thread that runs lets others run, until it is ready and its turn.
void take_turns() {
  Fiber& self = *fibers[block.running];
  Fiber* other = next();
  if (other != &self) self.switch_to(other != nullptr ? *other : launcher);
  if (block.cancelled) throw Cancelled();
}

// Until someone makes it ready.
void wait(const char* for_what, Location where) {
  Thread& thread = block.threads[block.running];
  thread.state = Thread::kWaiting;
  thread.waits_for = for_what;
  thread.where = where;
  take_turns();
}

namespace {

void run_thread() {
  const int index = block.running;
  try {
    (*block.kernel)();
  } catch (const Cancelled&) {
  } catch (...) {
    if (block.failure == nullptr) block.failure = std::current_exception();
  }
  block.threads[index].state = Thread::kDone;
  Fiber* other = block.cancelled ? nullptr : next();
  fibers[index]->exit_to(other != nullptr ? *other : launcher);
}

}  // namespace

void run_block() {
  const int count = block.launch->threads;
  std::memset(block.shared, 0xff, block.launch->shared_bytes);
  block.threads.assign(count, Thread());
  block.ready_warps = 0;
  std::fill(std::begin(block.ready), std::end(block.ready), 0);
  std::fill(std::begin(block.warps), std::end(block.warps), Meeting());
  std::fill(std::begin(block.barriers), std::end(block.barriers), Barrier());
  block.groups.clear();
  block.events.clear();
  block.slots.clear();
  block.failure = nullptr;
  block.changed = block.cancelled = false;
  for (int i = 0; i < count; ++i) {
    if (fibers.size() <= size_t(i)) fibers.push_back(std::make_unique<Fiber>());
    fibers[i]->prepare(run_thread);
    make_ready(i);
  }
  if (Fiber* first = next()) launcher.switch_to(*first);
  block.cancelled = true;
  for (int i = 0; i < count; ++i) {
    const auto state = block.threads[i].state;
    if (state == Thread::kRunning || state == Thread::kWaiting) {
      block.running = i;
      launcher.switch_to(*fibers[i]);
    }
  }
  block.running = -1;
  if (block.failure != nullptr) std::rethrow_exception(block.failure);
}

}  // namespace diffit::emulation

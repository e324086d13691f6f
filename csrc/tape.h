// A call of a chain as it was run once: the same operators and kernels on other tensors of the same shapes, without
// Python. What is recorded, says racecar_kernels/tape.py.
#pragma once

#include "binding.h"

#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace racecar {

using Slots = std::vector<at::Tensor>; // undefined: empty
using SlotOf = std::function<int(const at::Tensor &)>;

// What an instruction does: reads its slots, calls, and writes its results.
struct Instruction {
  std::function<void(Slots &)> run;
  std::vector<int> reads, writes;
  bool pure = false;     // it changes no tensor, and need not run where nobody reads what it writes
  std::vector<int> last; // slots that nobody reads behind it
};

// --- the tensors of a value, in a fixed order ----------------------------------------------------------------------

template <class F> void each_tensor(at::Tensor &t, F &&f) { f(t); }
template <class T, class F> std::enable_if_t<std::is_arithmetic_v<T>> each_tensor(T &, F &&) {}
template <class T, std::size_t n, class F> void each_tensor(std::array<T, n> &, F &&) {}
template <class T, class F> void each_tensor(std::optional<T> &value, F &&f) {
  if (value)
    each_tensor(*value, f);
}
template <class... T, class F> void each_tensor(std::tuple<T...> &value, F &&f) {
  std::apply([&](T &...part) { (each_tensor(part, f), ...); }, value);
}

// Turns a call of `function` with these arguments into an instruction. What it gives, as a flat list of tensors and
// None, is in the slots `writes`, -1 for None.
using Maker = std::function<Instruction(const pybind11::tuple &args, const SlotOf &slot_of, std::vector<int> writes)>;

inline std::unordered_map<std::string, Maker> &recordable() {
  static std::unordered_map<std::string, Maker> table;
  return table;
}

template <class R, class... A> Maker maker(R (*function)(A...)) {
  using Arguments = std::tuple<std::decay_t<A>...>;
  return [function](const pybind11::tuple &args, const SlotOf &slot_of, std::vector<int> writes) {
    auto given = pybind11::cast<Arguments>(args);
    Instruction made;
    each_tensor(given, [&](at::Tensor &t) {
      made.reads.push_back(slot_of(t));
      t = at::Tensor();
    });
    made.writes = writes;
    made.run = [function, given = std::move(given), reads = made.reads, writes = std::move(writes)](Slots &slots) {
      Arguments own = given; // of this run: several may be on their way
      std::size_t next = 0;
      each_tensor(own, [&](at::Tensor &t) { t = slots[static_cast<std::size_t>(reads[next++])]; });
      R result = std::apply(function, own);
      next = 0;
      // an optional result that is not there has no slot, so those that are there stand in turn
      each_tensor(result, [&](at::Tensor &t) {
        while (writes[next] < 0)
          ++next;
        slots[static_cast<std::size_t>(writes[next++])] = std::move(t);
      });
    };
    return made;
  };
}

// Makes a function known to Python under its name, and to tapes.
template <class F, class... Extra>
void define(pybind11::module_ &module, const char *name, F function, Extra... extra) {
  module.def(name, function, extra...);
  recordable()[name] = maker(function);
}

} // namespace racecar

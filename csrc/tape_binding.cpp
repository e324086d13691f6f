// Replays what racecar_kernels/tape.py has recorded.

#include "tape.h"

#include <ATen/ScalarOps.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <algorithm>
#include <iterator>

namespace {

namespace py = pybind11;
using at::Tensor;
using racecar::Instruction;
using racecar::SlotOf;
using racecar::Slots;

// --- an operator of PyTorch ------------------------------------------------------------------------------------------

// Replaces every tensor in a value by f of it.
template <class F> c10::IValue with_tensors(const c10::IValue &value, F &&f) {
  if (value.isTensor() && value.toTensor().defined())
    return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor &t : value.toTensorVector())
      list.push_back(f(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor> &t : value.toOptionalTensorVector())
      list.push_back(t ? std::optional<Tensor>(f(*t)) : std::nullopt);
    return list;
  }
  return value;
}

bool has_tensors(const c10::IValue &value) {
  bool any = false;
  with_tensors(value, [&](const Tensor &t) {
    any = true;
    return t;
  });
  return any;
}

void keep(const c10::IValue &value, const std::vector<int> &writes, std::size_t &next, Slots &slots) {
  const auto put = [&](const Tensor &t) {
    const int slot = writes.at(next++);
    if (slot >= 0)
      slots[static_cast<std::size_t>(slot)] = t;
  };
  if (value.isTensor())
    put(value.toTensor());
  else if (value.isTensorList())
    for (const Tensor &t : value.toTensorVector())
      put(t);
  else
    ++next;
}

// Numbers where a tensor is declared, as Python may give them, as PyTorch takes them.
py::tuple numbers_wrapped(const c10::FunctionSchema &schema, const py::tuple &args) {
  py::tuple wrapped(args.size());
  for (std::size_t i = 0; i < args.size(); ++i) {
    wrapped[i] = args[i];
    const bool whole = py::isinstance<py::int_>(args[i]), number = whole || py::isinstance<py::float_>(args[i]);
    if (number && schema.arguments().at(i).type()->kind() == c10::TypeKind::TensorType) {
      const at::Scalar value = whole ? at::Scalar(py::cast<int64_t>(args[i])) : at::Scalar(py::cast<double>(args[i]));
      Tensor t = c10::scalar_to_tensor(value);
      t.unsafeGetTensorImpl()->set_wrapped_number(true);
      wrapped[i] = py::cast(t);
    }
  }
  return wrapped;
}

bool is_number(const c10::IValue &value) {
  return value.isTensor() && value.toTensor().defined() && value.toTensor().unsafeGetTensorImpl()->is_wrapped_number();
}

Instruction of_operator(const std::string &name, const std::string &overload, const py::tuple &args,
                        const py::dict &kwargs, const SlotOf &slot_of, std::vector<int> writes) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  torch::jit::Stack stack =
      torch::jit::createStackForSchema(op.schema(), numbers_wrapped(op.schema(), args), kwargs, std::nullopt);
  Instruction made;
  made.writes = writes;
  made.pure = !op.schema().is_mutable();
  std::vector<std::size_t> places; // of the arguments that hold tensors: the others are as they were
  // a tensor with the slot's number in its place: lists keep their structure
  for (std::size_t i = 0; i < stack.size(); ++i) {
    if (!has_tensors(stack[i]) || is_number(stack[i]))
      continue;
    places.push_back(i);
    stack[i] = with_tensors(stack[i], [&](const Tensor &t) {
      made.reads.push_back(slot_of(t));
      return Tensor();
    });
  }
  made.run = [op, stack = std::move(stack), places = std::move(places), reads = made.reads,
              writes = std::move(writes)](Slots &slots) {
    torch::jit::Stack own = stack;
    std::size_t next = 0;
    for (const std::size_t i : places) {
      const auto read = [&](const Tensor &) { return slots[static_cast<std::size_t>(reads[next++])]; };
      own[i] = own[i].isTensor() ? c10::IValue(read({})) : with_tensors(own[i], read);
    }
    op.callBoxed(own);
    next = 0;
    for (const c10::IValue &value : own)
      keep(value, writes, next, slots);
  };
  return made;
}

// --- what a tape is good for -----------------------------------------------------------------------------------------

// What everything that was decided in Python followed from. Tensors that are one and the same stay so.
struct Fitting {
  explicit Fitting(const std::optional<Tensor> &t, int first)
      : there(t), same_as(first), dtype(t ? t->scalar_type() : at::kFloat), device(t ? t->device() : at::kCPU) {
    if (t)
      sizes = t->sizes().vec(), strides = t->strides().vec();
  }
  bool fits(const std::optional<Tensor> &t) const {
    return there == t.has_value() && (!there || (t->scalar_type() == dtype && t->device() == device &&
                                                 t->sizes() == sizes && t->strides() == strides));
  }
  bool there;
  int same_as; // number of the first input that is this tensor
  at::ScalarType dtype;
  at::Device device;
  std::vector<int64_t> sizes, strides;
};

int first_like(const std::vector<std::optional<Tensor>> &inputs, std::size_t i) {
  for (std::size_t j = 0; j < i; ++j)
    if (inputs[i] && inputs[j] && inputs[i]->is_same(*inputs[j]))
      return static_cast<int>(j);
  return static_cast<int>(i);
}

class Tape {
public:
  explicit Tape(const std::vector<std::optional<Tensor>> &inputs) {
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      inputs_.emplace_back(inputs[i], first_like(inputs, i));
      ++size_;
      if (inputs[i] && inputs_[i].same_as == static_cast<int>(i))
        remember(*inputs[i], i);
    }
  }

  // The slot of a tensor, a new one for one that is new; -1 for None.
  int slot(const std::optional<Tensor> &t) {
    if (!t)
      return -1;
    if (!knows(*t))
      remember(*t, size_++);
    return slots_.at(t->unsafeGetTensorImpl());
  }
  bool knows(const Tensor &t) const { return slots_.count(t.unsafeGetTensorImpl()) > 0; }

  void add_operator(const std::string &name, const std::string &overload, const py::tuple &args, const py::dict &kwargs,
                    const std::vector<std::optional<Tensor>> &results) {
    code_.push_back(of_operator(name, overload, args, kwargs, slot_of(), slots_of(results)));
  }
  void add_kernel(const std::string &name, const py::tuple &args, const std::vector<std::optional<Tensor>> &results) {
    code_.push_back(racecar::recordable().at(name)(args, slot_of(), slots_of(results)));
  }

  // `again` takes the list of the tensors that are read and gives that of the results.
  void add_call(const py::function &again, const std::vector<std::optional<Tensor>> &reads,
                const std::vector<std::optional<Tensor>> &results) {
    Instruction made;
    made.reads = slots_of(reads), made.writes = slots_of(results);
    made.run = [again, from = made.reads, to = made.writes](Slots &slots) {
      const py::gil_scoped_acquire gil;
      py::list given;
      for (const int slot : from)
        given.append(slot < 0 ? py::object(py::none()) : py::cast(slots[static_cast<std::size_t>(slot)]));
      const py::list found = again(given);
      for (std::size_t i = 0; i < to.size(); ++i)
        if (to[i] >= 0)
          slots[static_cast<std::size_t>(to[i])] = py::cast<Tensor>(found[i]);
    };
    code_.push_back(std::move(made));
  }

  // No more instructions follow. Leaves out what nobody reads, and finds where every tensor is needed last.
  void finish(const std::vector<std::optional<Tensor>> &results) {
    results_ = slots_of(results);
    std::vector<bool> read(size_, false);
    for (const int r : results_)
      if (r >= 0)
        read[static_cast<std::size_t>(r)] = true;
    std::vector<Instruction> left;
    for (auto it = code_.rbegin(); it != code_.rend(); ++it) {
      const auto wanted = [&](int w) { return w >= 0 && read[static_cast<std::size_t>(w)]; };
      if (it->pure && std::none_of(it->writes.begin(), it->writes.end(), wanted))
        continue;
      for (const auto *touched : {&it->reads, &it->writes})
        for (const int slot : *touched)
          if (slot >= 0 && !read[static_cast<std::size_t>(slot)]) {
            read[static_cast<std::size_t>(slot)] = true;
            it->last.push_back(slot);
          }
      left.push_back(std::move(*it));
    }
    code_.assign(std::make_move_iterator(left.rbegin()), std::make_move_iterator(left.rend()));
    for (std::size_t i = 0; i < inputs_.size(); ++i)
      if (!read[i])
        unread_.push_back(static_cast<int>(i));
    seen_.clear(), slots_.clear();
  }

  bool fits(const std::vector<std::optional<Tensor>> &inputs) const {
    if (inputs.size() != inputs_.size())
      return false;
    for (std::size_t i = 0; i < inputs.size(); ++i)
      if (!inputs_[i].fits(inputs[i]) || first_like(inputs, i) != inputs_[i].same_as)
        return false;
    return true;
  }

  std::vector<std::optional<Tensor>> run(std::vector<std::optional<Tensor>> inputs) const {
    Slots slots(size_);
    for (std::size_t i = 0; i < inputs.size(); ++i)
      if (inputs[i])
        slots[i] = std::move(*inputs[i]);
    inputs.clear();
    for (const int slot : unread_)
      slots[static_cast<std::size_t>(slot)] = Tensor();
    const at::AutoDispatchBelowAutograd below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    for (const Instruction &instruction : code_) {
      instruction.run(slots);
      for (const int slot : instruction.last)
        slots[static_cast<std::size_t>(slot)] = Tensor();
    }
    std::vector<std::optional<Tensor>> found;
    for (const int r : results_)
      found.push_back(r < 0 ? std::nullopt : std::optional<Tensor>(slots[static_cast<std::size_t>(r)]));
    return found;
  }

  std::size_t length() const { return code_.size(); }

private:
  void remember(const Tensor &t, std::size_t slot) {
    slots_[t.unsafeGetTensorImpl()] = static_cast<int>(slot);
    seen_.emplace_back(t.getIntrusivePtr());
  }
  SlotOf slot_of() {
    return [this](const Tensor &t) { return slot(t); };
  }
  std::vector<int> slots_of(const std::vector<std::optional<Tensor>> &tensors) {
    std::vector<int> found;
    for (const auto &t : tensors)
      found.push_back(slot(t));
    return found;
  }

  std::vector<Fitting> inputs_;
  std::vector<Instruction> code_;
  std::vector<int> results_, unread_;
  std::size_t size_ = 0;
  // While it is recorded, every tensor that was seen: weakly, so that its memory is let go and its address is not.
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> seen_;
  std::unordered_map<const c10::TensorImpl *, int> slots_;
};

// Takes the tensors out of the list, so that each is let go after its last use.
std::vector<std::optional<Tensor>> run_and_empty(const Tape &tape, const py::list &inputs) {
  auto given = py::cast<std::vector<std::optional<Tensor>>>(inputs);
  inputs.attr("clear")();
  const py::gil_scoped_release no_gil;
  return tape.run(std::move(given));
}

} // namespace

void bind_tape(py::module_ &module) {
  py::class_<Tape>(module, "Tape")
      .def(py::init<const std::vector<std::optional<Tensor>> &>())
      .def("knows", &Tape::knows)
      .def("add_operator", &Tape::add_operator)
      .def("add_kernel", &Tape::add_kernel)
      .def("add_call", &Tape::add_call)
      .def("finish", &Tape::finish)
      .def("fits", &Tape::fits)
      .def("run", &run_and_empty)
      .def("__len__", &Tape::length);
  py::set names;
  for (const auto &own : racecar::recordable())
    names.add(own.first);
  module.attr("recordable") = names;
}

// A chain of linear layers for Python: its two directions as functions, and as a node of the autograd graph.

#include "binding.h"
#include "linear_chain_run.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace {

namespace py = pybind11;
using at::Tensor;
using racecar::ChainBackward;
using racecar::ChainForward;
using racecar::ChainNeeds;
using racecar::Elementwise;
using racecar::Gradients;
using racecar::LinearChain;
using racecar::MaybeTensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Chain = std::shared_ptr<LinearChain>;
// The number of the activation and its parameters, as pointwise.h defines them.
using Act = std::tuple<int64_t, std::array<double, 3>>;

Chain make_chain(const std::vector<Act> &acts, std::vector<bool> compare, bool full, int64_t widest) {
  TORCH_CHECK(!compare.empty() && acts.size() == compare.size() + 1, "a chain of ", compare.size(), " layers has ",
              compare.size() + 1, " latents, the input's included, got ", acts.size());
  std::vector<Elementwise> latents;
  for (const auto &[act, p] : acts) {
    TORCH_CHECK(act >= 0 && act < racecar::kActs, "there is no activation number ", act);
    latents.push_back({static_cast<racecar::Act>(act), {p[0], p[1], p[2]}});
  }
  return std::make_shared<LinearChain>(std::move(latents), std::move(compare), full, widest);
}

MaybeTensor maybe(const Tensor &t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

std::vector<Tensor> listed(const Tensor &t) { return t.defined() ? std::vector<Tensor>{t} : std::vector<Tensor>{}; }

std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> forward(const LinearChain &chain, const Tensor &x,
                                                                             const Gradients &weights,
                                                                             const std::vector<MaybeTensor> &biases,
                                                                             bool store, bool reverse) {
  const ChainForward found = chain.forward(x, weights, biases, store, reverse);
  return {found.out, found.losses, listed(found.d), listed(found.a)};
}

std::tuple<MaybeTensor, std::vector<MaybeTensor>, std::vector<MaybeTensor>, MaybeTensor>
backward(const LinearChain &chain, const MaybeTensor &grad_out, const MaybeTensor &grad_losses, const Tensor &x,
         const Gradients &weights, const std::vector<MaybeTensor> &biases, const Tensor &out, const MaybeTensor &d,
         const MaybeTensor &a, bool needs_x, std::vector<bool> needs_weights, std::vector<bool> needs_biases) {
  const ChainNeeds needs{needs_x, std::move(needs_weights), std::move(needs_biases)};
  TORCH_CHECK(needs.weights.size() == weights.size() && needs.biases.size() == weights.size(), weights.size(),
              " layers need to know as often whether a gradient is wanted");
  const ChainBackward found = chain.backward(grad_out, grad_losses, x, weights, biases, out, d, a, needs);
  std::vector<MaybeTensor> of_weights, of_biases;
  for (size_t m = 0; m < weights.size(); ++m) {
    of_weights.push_back(maybe(found.weights[m]));
    of_biases.push_back(maybe(found.biases[m]));
  }
  return {maybe(found.x), std::move(of_weights), std::move(of_biases), maybe(found.losses)};
}

// --- the node ---------------------------------------------------------------------------------------------------

// What a node needs beside its tensors.
struct Recipe : torch::CustomClassHolder {
  Chain chain;
  bool store = false, reverse = true;
  std::vector<bool> has_bias;
  std::shared_ptr<py::object> report; // receives the losses that the backward finds
};

// A Python object that may be let go without the interpreter's lock.
std::shared_ptr<py::object> owned(py::object object) {
  return {new py::object(std::move(object)), [](py::object *held) {
            if (!Py_IsInitialized()) {
              held->release();
              delete held;
              return;
            }
            const py::gil_scoped_acquire lock;
            delete held;
          }};
}

struct Inputs {
  Tensor x;
  Gradients weights;
  std::vector<MaybeTensor> biases;

  // From x, the weights and the biases there are.
  Inputs(const Tensor *flat, const std::vector<bool> &has_bias) : x(flat[0]) {
    const size_t n = has_bias.size();
    weights.assign(flat + 1, flat + 1 + n);
    const Tensor *next = flat + 1 + n;
    for (const bool has : has_bias)
      biases.push_back(has ? MaybeTensor(*next++) : std::nullopt);
  }
};

class TiedLinearChain : public torch::autograd::Function<TiedLinearChain> {
public:
  static variable_list forward(AutogradContext *ctx, const c10::intrusive_ptr<Recipe> &recipe, at::TensorList flat) {
    const Inputs inputs(flat.data(), recipe->has_bias);
    ChainForward found;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      found = recipe->chain->forward(inputs.x, inputs.weights, inputs.biases, recipe->store, recipe->reverse);
    }
    variable_list saved = flat.vec();
    if (found.d.defined())
      saved.insert(saved.end(), {found.out, found.d});
    if (found.a.defined())
      saved.push_back(found.a);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["recipe"] = c10::IValue::make_capsule(recipe);
    ctx->set_materialize_grads(false);
    return {found.out, found.losses};
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &incoming) {
    const auto recipe = c10::static_intrusive_pointer_cast<Recipe>(ctx->saved_data["recipe"].toCapsule());
    const size_t n = recipe->has_bias.size();
    const variable_list saved = ctx->get_saved_variables();
    size_t inputs_count = 1 + n;
    for (const bool has : recipe->has_bias)
      inputs_count += has;
    variable_list grads(1 + inputs_count); // the recipe's own place stays empty
    if (!incoming[0].defined() && !incoming[1].defined())
      return grads;
    for (const Tensor &g : incoming)
      TORCH_CHECK(!g.defined() || !at::isTensorSubclassLike(g),
                  "a chain's backward takes one gradient at a time, not a batch of them (is_grads_batched=True)");
    const Inputs inputs(saved.data(), recipe->has_bias);
    ChainNeeds needs{ctx->needs_input_grad(0), std::vector<bool>(n), std::vector<bool>(n)};
    for (size_t m = 0, next = 1 + n; m < n; ++m) {
      needs.weights[m] = ctx->needs_input_grad(1 + m);
      needs.biases[m] = recipe->has_bias[m] && ctx->needs_input_grad(next);
      next += recipe->has_bias[m];
    }
    const size_t kept = saved.size() - inputs_count;
    const MaybeTensor d = kept > 1 ? MaybeTensor(saved[inputs_count + 1]) : std::nullopt;
    const MaybeTensor a = kept > 2 ? MaybeTensor(saved[inputs_count + 2]) : std::nullopt;
    const bool again = at::GradMode::is_enabled(); // create_graph=True
    ChainBackward found;
    {
      const at::AutoDispatchBelowAutograd below;
      found = recipe->chain->backward(maybe(incoming[0]), maybe(incoming[1]), inputs.x, inputs.weights, inputs.biases,
                                      kept ? saved[inputs_count] : Tensor(), d, a, needs);
    }
    report(*recipe, found.losses);
    grads[1] = found.x;
    for (size_t m = 0, next = 2 + n; m < n; ++m) {
      grads[2 + m] = found.weights[m];
      if (recipe->has_bias[m])
        grads[next++] = found.biases[m];
    }
    return again ? once_only(std::move(grads), saved, incoming) : grads;
  }

private:
  static void report(const Recipe &recipe, const Tensor &losses) {
    if (!recipe.report || !losses.defined())
      return;
    const py::gil_scoped_acquire lock;
    recipe.report->attr("losses") = losses;
  }

  // Gradients that refuse to be differentiated again.
  static variable_list once_only(variable_list grads, const variable_list &saved, const variable_list &incoming) {
    std::vector<Tensor> found, from = saved;
    for (const Tensor &g : grads)
      if (g.defined())
        found.push_back(g);
    for (const Tensor &g : incoming)
      if (g.defined())
        from.push_back(g);
    const py::gil_scoped_acquire lock;
    const py::object refuse = py::module_::import("racecar_kernels.linear_chain").attr("first_derivatives_only");
    found = refuse(found, from).cast<std::vector<Tensor>>();
    auto next = found.begin();
    for (Tensor &g : grads)
      if (g.defined())
        g = *next++;
    return grads;
  }
};

// Whether somebody watches or changes what is computed (a mode, a transform, a trace, a subclass): then only the
// operator, which they see, will do.
bool is_plain(const Tensor &t) { return !at::isTensorSubclassLike(t) && !t.is_conj() && !t.is_neg(); }

bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || torch::jit::tracer::isTracing() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// The tensor that a Python object is, if it is one that any kernel may take for what it is.
bool take(py::handle object, variable_list &into) {
  if (!THPVariable_Check(object.ptr()))
    return false;
  const Tensor &t = THPVariable_Unpack(object.ptr());
  if (!is_plain(t))
    return false;
  into.push_back(t);
  return true;
}

// Output and losses as one node of the graph; None where this needs the operator, with all its checks.
std::optional<std::pair<Tensor, Tensor>> apply(const Chain &chain, py::handle x, const py::sequence &weights,
                                               const py::sequence &biases, bool store, bool reverse,
                                               py::object report) {
  variable_list flat;
  flat.reserve(1 + weights.size() + biases.size());
  bool plain = !is_watched() && take(x, flat);
  for (const py::handle weight : weights)
    plain = plain && take(weight, flat);
  auto recipe = c10::make_intrusive<Recipe>();
  for (const py::handle bias : biases) {
    recipe->has_bias.push_back(!bias.is_none());
    plain = plain && (bias.is_none() || take(bias, flat));
  }
  if (!plain || weights.size() != biases.size())
    return std::nullopt;
  const Inputs inputs(flat.data(), recipe->has_bias);
  if (!chain->serves(inputs.x, inputs.weights, inputs.biases))
    return std::nullopt;
  bool differentiated = false;
  for (const Tensor &t : flat)
    differentiated = differentiated || t.requires_grad();
  differentiated = differentiated && at::GradMode::is_enabled();
  recipe->chain = chain, recipe->store = store && differentiated;
  recipe->reverse = reverse || !differentiated; // no backward will come: the losses are found at once
  if (!recipe->reverse && !report.is_none())
    recipe->report = owned(std::move(report));
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION("racecar::tied_chain", std::vector<c10::IValue>());
  variable_list found = TiedLinearChain::apply(recipe, at::TensorList(flat));
  return std::make_pair(std::move(found[0]), std::move(found[1]));
}

} // namespace

void bind_linear_chain(py::module_ &module) {
  using no_gil = py::call_guard<py::gil_scoped_release>;
  py::class_<LinearChain, Chain>(module, "LinearChain", "A chain of narrow linear layers, without its tensors.")
      .def(py::init(&make_chain))
      .def("forward", &forward, no_gil())
      .def("backward", &backward, no_gil())
      .def("apply", &apply);
}

// Calls compiled programs on tensors, and records them for autograd.
//
// `call(program, x, *tensors)` returns what the program makes, or None where it has no kernel for
// such tensors yet. The same in Python takes 20 us longer for a forward and its backward.
#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Numbers = std::vector<int64_t>;
using Function = void (*)(void **, const double *, const int64_t *, int64_t);

// A permutation that a tensor needs first; none where it has no sizes.
struct Order {
  Numbers sizes, places;
};

struct Kernel : torch::CustomClassHolder {
  Numbers shape, strides, counts, dtypes; // of x; of x and the tensors
  Function forward, backward;
  bool copies, residual;
  Numbers loops;
  std::vector<double> extents;
  int64_t threads, groups, saved, updates;
  at::ScalarType single, result;
  Order kept;
  std::vector<Order> orders;
  Numbers free, used, firm, copied;
  PyObject *reference;
};

constexpr size_t MOST = 64; // shapes of a program that are looked for here, the latest first

using Found = c10::intrusive_ptr<Kernel>;
std::vector<std::vector<Found>> programs;

// A new tensor in the layout of another, without a way through the dispatcher.
Tensor fresh(const Tensor &like, at::ScalarType dtype) {
  return Tensor(at::detail::empty_strided_cpu(like.sizes(), like.strides(), dtype));
}

Tensor dense(const Tensor &tensor, const Order &order) {
  if (order.sizes.empty()) return tensor.contiguous();
  return tensor.reshape(order.sizes).permute(order.places).contiguous();
}

Tensor back(const Tensor &made, const Tensor &tensor, const Order &order) {
  if (order.sizes.empty()) return made;
  Numbers inverse(order.places.size());
  for (size_t i = 0; i < inverse.size(); ++i) inverse[order.places[i]] = int64_t(i);
  return made.permute(inverse).reshape(tensor.sizes());
}

// Whether nobody else has a cotangent or its memory, which torch allocated: x's may be written there.
bool is_own(const Tensor &dy) {
  const c10::Storage &memory = dy.storage();
  return dy.use_count() == 1 && memory.use_count() == 1 &&
         memory.data_ptr().get_deleter() == c10::GetCPUAllocator()->raw_deleter();
}

Tensor like(const Tensor &tensor, const Tensor &x) {
  return tensor.strides() == x.strides() ? tensor : at::empty_like(x, tensor.options()).copy_(tensor);
}

int64_t threads(const Kernel &kernel) { return std::min<int64_t>(at::get_num_threads(), kernel.threads); }

// Whether a tensor is what it seems: nobody looks on, and its numbers lie in this memory.
bool is_plain(const Tensor &tensor) {
  constexpr c10::DispatchKeySet plain = c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView}) |
                                        c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                        c10::autocast_dispatch_keyset;
  const bool watched = (tensor.key_set() - plain).highestFunctionalityKey() != c10::DispatchKey::Undefined;
  return !watched && tensor.is_cpu() && tensor.has_storage() && !tensor._fw_grad(0).defined();
}

// Whether something must see the operations: a mode, a transform, a trace.
bool is_observed() {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         local.included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         local.included_.has(c10::DispatchKey::Tracer);
}

// y, then the updates; the moments.
std::pair<variable_list, Tensor> run(const Kernel &kernel, const Tensor &x, const variable_list &given) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  Tensor y = fresh(x, kernel.result);
  Tensor moments(at::detail::empty_cpu({kernel.saved, kernel.groups}, kernel.single));
  const size_t count = kernel.orders.size();
  Tensor residual = kernel.residual ? like(given[count], x) : Tensor();
  std::vector<Tensor> held(count);
  std::vector<void *> pointers{x.data_ptr(), residual.defined() ? residual.data_ptr() : nullptr, y.data_ptr(),
                               moments.data_ptr()};
  variable_list made{y};
  for (int64_t i = 0; i < kernel.updates; ++i) {
    made.emplace_back(at::detail::empty_cpu(kernel.kept.sizes, kernel.single));
    pointers.push_back(made.back().data_ptr());
  }
  for (size_t i = 0; i < count; ++i) {
    held[i] = dense(given[i], kernel.orders[i]);
    pointers.push_back(held[i].data_ptr());
  }
  kernel.forward(pointers.data(), kernel.extents.data(), kernel.loops.data(), threads(kernel));
  if (!std::is_sorted(kernel.kept.places.begin(), kernel.kept.places.end()))
    for (int64_t i = 1; i <= kernel.updates; ++i) made[i] = made[i].permute(kernel.kept.places);
  return {made, moments};
}

// The gradients of x where it is wanted, of the free tensors, and of the residual.
std::tuple<Tensor, variable_list, Tensor> gradients(const Kernel &kernel, const Tensor &cotangent, const Tensor &x,
                                                    const Tensor &y, const Tensor &moments, const variable_list &given,
                                                    bool wanted, bool is_free) {
  Tensor dy = like(cotangent, x), dx;
  if (wanted) dx = is_free && dy.scalar_type() == x.scalar_type() ? dy.detach() : fresh(x, x.scalar_type());
  Tensor dresidual = kernel.residual ? fresh(x, x.scalar_type()) : Tensor();
  const auto at = [](const Tensor &tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; };
  std::vector<void *> pointers{at(dy), at(x), at(y), at(moments), at(dx), at(dresidual)};
  variable_list held(given.size()), made;
  for (size_t i = 0; i < given.size(); ++i) {
    if (given[i].defined()) held[i] = dense(given[i], kernel.orders[i]);
    pointers.push_back(at(held[i]));
  }
  for (int64_t i : kernel.free) {
    made.push_back(fresh(held[i], held[i].scalar_type()));
    pointers.push_back(made.back().data_ptr());
  }
  kernel.backward(pointers.data(), kernel.extents.data(), kernel.loops.data(), threads(kernel));
  for (size_t i = 0; i < made.size(); ++i) made[i] = back(made[i], given[kernel.free[i]], kernel.orders[kernel.free[i]]);
  return {dx, made, dresidual};
}

// Gradients that can be differentiated again, by the formula from torch's operations.
variable_list of_reference(const Kernel &kernel, const variable_list &given, const std::vector<bool> &needed,
                           const Tensor &dy) {
  PyGILState_STATE state = PyGILState_Ensure();
  PyObject *tensors = PyList_New(Py_ssize_t(given.size())), *wanted = PyList_New(Py_ssize_t(given.size()));
  for (size_t i = 0; i < given.size(); ++i) {
    PyObject *one = given[i].defined() ? THPVariable_Wrap(given[i]) : Py_NewRef(Py_None);
    PyList_SET_ITEM(tensors, Py_ssize_t(i), one);
    PyList_SET_ITEM(wanted, Py_ssize_t(i), PyBool_FromLong(needed[i]));
  }
  PyObject *cotangent = THPVariable_Wrap(dy);
  PyObject *found = PyObject_CallFunctionObjArgs(kernel.reference, tensors, wanted, cotangent, nullptr);
  Py_DECREF(tensors), Py_DECREF(wanted), Py_DECREF(cotangent);
  if (found == nullptr) {
    python_error error;
    error.persist();
    PyGILState_Release(state);
    throw error;
  }
  variable_list result(given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    PyObject *one = PyList_GET_ITEM(found, Py_ssize_t(i));
    if (one != Py_None) result[i] = THPVariable_Unpack(one);
  }
  Py_DECREF(found);
  PyGILState_Release(state);
  return result;
}

// What a node keeps of a kernel: a tensor, as compiled autograd gives a node nothing else back.
Tensor held(const Found &kernel) {
  return at::from_blob(kernel.get(), {int64_t(sizeof(Kernel))}, [kernel](void *) {}, at::kByte);
}

// Which kernel is called, and where y and the updates go.
struct Call {
  const Found &kernel;
  variable_list &made;
};

struct Norm : torch::autograd::Function<Norm> {
  // Returns y alone: compiled autograd takes no node with results that have no gradient.
  static Tensor forward(AutogradContext *context, const Call &call, at::TensorList given) {
    const Found &kernel = call.kernel;
    const Tensor &x = given[0];
    variable_list tensors(given.begin() + 1, given.end());
    auto [made, moments] = run(*kernel, x, tensors);
    variable_list saved{x, moments};
    for (size_t i = 0; i < kernel->orders.size(); ++i) {
      const auto has = [&](const Numbers &list) {
        return std::find(list.begin(), list.end(), int64_t(i)) != list.end();
      };
      if (!has(kernel->used)) {
        saved.emplace_back();
      } else if (has(kernel->copied)) {
        at::AutoGradMode derivatives_of_derivatives(true); // they reach it
        saved.push_back(tensors[i].clone()); // it may change before the backward
      } else if (!has(kernel->firm)) {
        saved.push_back(tensors[i].variable_data()); // and so may this: its value is not asked for
      } else {
        saved.push_back(tensors[i]);
      }
    }
    if (kernel->residual) saved.push_back(made[0]); // the mask of its activation
    context->save_for_backward(std::move(saved));
    context->saved_data["kernel"] = held(kernel);
    context->set_materialize_grads(false);
    call.made = std::move(made);
    return call.made[0];
  }

  static variable_list backward(AutogradContext *context, const variable_list &cotangents) {
    const Tensor held_kernel = context->saved_data["kernel"].toTensor();
    const Kernel &kernel = *static_cast<const Kernel *>(held_kernel.data_ptr());
    variable_list saved = context->get_saved_variables();
    const Tensor &x = saved[0], &moments = saved[1], y = kernel.residual ? saved.back() : Tensor();
    const size_t given = saved.size() - 1, count = kernel.orders.size(); // x, tensors, residual
    variable_list result(1 + given);
    if (!cotangents[0].defined()) return result;
    std::vector<bool> needed(given);
    for (size_t i = 0; i < given; ++i) needed[i] = context->needs_input_grad(i);
    if (c10::GradMode::is_enabled() || is_observed() || !is_plain(cotangents[0])) {
      variable_list inputs{x};
      inputs.insert(inputs.end(), saved.begin() + 2, saved.end());
      variable_list found = of_reference(kernel, inputs, needed, cotangents[0]);
      std::copy(found.begin(), found.end(), result.begin() + 1);
      return result;
    }
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const variable_list tensors(saved.begin() + 2, saved.begin() + 2 + count);
    const bool is_free = is_own(cotangents[0]);
    auto [dx, made, dresidual] = gradients(kernel, cotangents[0], x, y, moments, tensors, needed[0], is_free);
    result[1] = dx;
    for (size_t i = 0; i < kernel.free.size(); ++i)
      if (needed[1 + kernel.free[i]]) result[2 + kernel.free[i]] = made[i];
    if (kernel.residual) result.back() = dresidual;
    return result;
  }
};

Found find(std::vector<Found> &kernels, const variable_list &given) {
  const Tensor &x = given[0];
  for (size_t place = 0; place < kernels.size(); ++place) {
    const Found kernel = kernels[place];
    bool same = x.sizes() == at::IntArrayRef(kernel->shape) && x.strides() == at::IntArrayRef(kernel->strides);
    same = same && given.size() == kernel->dtypes.size();
    for (size_t i = 0; same && i < given.size(); ++i)
      same = int64_t(given[i].scalar_type()) == kernel->dtypes[i] && given[i].numel() == kernel->counts[i];
    if (same && kernel->residual) same = given.back().sizes() == x.sizes();
    if (!same) continue;
    if (place > 0) std::swap(kernels[place], kernels[place - 1]);
    return kernel;
  }
  return {};
}

PyObject *call(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (is_observed()) Py_RETURN_NONE;
  auto &kernels = programs[PyLong_AsSize_t(arguments[0])];
  variable_list given;
  given.reserve(count - 1);
  bool recorded = false;
  for (Py_ssize_t i = 1; i < count; ++i) {
    if (!THPVariable_CheckExact(arguments[i])) Py_RETURN_NONE;
    given.push_back(THPVariable_Unpack(arguments[i]));
    if (!is_plain(given.back())) Py_RETURN_NONE;
    recorded = recorded || given.back().requires_grad();
  }
  const Found kernel = find(kernels, given);
  if (!kernel) Py_RETURN_NONE;
  variable_list made;
  {
    pybind11::gil_scoped_release without_lock;
    if (kernel->copies) given[0] = given[0].clone(at::MemoryFormat::Preserve);
    if (recorded && c10::GradMode::is_enabled()) {
      for (Tensor &one : given)
        if (one.is_inference()) one = one.clone(); // to be saved
      const Tensor y = Norm::apply(Call{kernel, made}, at::TensorList(given));
      made[0] = y;
    } else {
      at::NoGradGuard no_grad;
      made = run(*kernel, given[0], variable_list(given.begin() + 1, given.end())).first;
    }
  }
  PyObject *result = PyTuple_New(Py_ssize_t(made.size()));
  for (size_t i = 0; i < made.size(); ++i) PyTuple_SET_ITEM(result, Py_ssize_t(i), THPVariable_Wrap(made[i]));
  return result;
  END_HANDLE_TH_ERRORS
}

// Moments in the order of the program's axes from that in memory, or back: x may be moved in between.
Tensor ordered(const Kernel &kernel, const Tensor &moments, bool back) {
  const Numbers &places = kernel.kept.places;
  if (std::is_sorted(places.begin(), places.end())) return moments.contiguous();
  Numbers sizes{-1}, order{0};
  for (size_t i = 0; i < places.size(); ++i) {
    const auto inverse = std::find(places.begin(), places.end(), int64_t(i)) - places.begin();
    sizes.push_back(kernel.kept.sizes[back ? places[i] : i]);
    order.push_back(1 + (back ? inverse : places[i]));
  }
  return moments.reshape(sizes).permute(order).reshape(moments.sizes()).contiguous();
}

// The tensors of an operator's call, x first; its kernel, none where nobody may call it on their memory.
Found operands(PyObject *program, PyObject *x, PyObject *tensors, bool residual, variable_list &given) {
  if (is_observed()) return {};
  given.push_back(THPVariable_Unpack(x));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i)
    given.push_back(THPVariable_Unpack(PyList_GET_ITEM(tensors, i)));
  if (residual) given.push_back(given[0]); // of which a backward reads nothing
  if (!std::all_of(given.begin(), given.end(), is_plain)) return {};
  return find(programs[PyLong_AsSize_t(program)], given);
}

PyObject *list_of(const variable_list &tensors) {
  PyObject *result = PyList_New(Py_ssize_t(tensors.size()));
  for (size_t i = 0; i < tensors.size(); ++i) PyList_SET_ITEM(result, Py_ssize_t(i), THPVariable_Wrap(tensors[i]));
  return result;
}

// forward(program, x, tensors) of the operator: y, the moments, the updates; None without a kernel.
PyObject *forward(PyObject *, PyObject *const *arguments, Py_ssize_t) {
  HANDLE_TH_ERRORS
  variable_list given, made;
  const Found kernel = operands(arguments[0], arguments[1], arguments[2], false, given);
  if (!kernel) Py_RETURN_NONE;
  {
    pybind11::gil_scoped_release without_lock;
    at::NoGradGuard no_grad;
    if (kernel->copies) given[0] = given[0].clone(at::MemoryFormat::Preserve);
    auto [values, moments] = run(*kernel, given[0], variable_list(given.begin() + 1, given.end()));
    made = {values[0], ordered(*kernel, moments, false)};
    for (size_t i = 1; i < values.size(); ++i) made.push_back(values[i].contiguous());
  }
  return list_of(made);
  END_HANDLE_TH_ERRORS
}

// backward(program, dy, x, y, moments, tensors) of the operator; None without a kernel.
PyObject *backward(PyObject *, PyObject *const *arguments, Py_ssize_t) {
  HANDLE_TH_ERRORS
  variable_list given, made;
  const bool residual = arguments[3] != Py_None;
  const Found kernel = operands(arguments[0], arguments[2], arguments[5], residual, given);
  const Tensor &dy = THPVariable_Unpack(arguments[1]);
  if (!kernel || !is_plain(dy)) Py_RETURN_NONE;
  Tensor y = residual ? THPVariable_Unpack(arguments[3]) : Tensor();
  const Tensor &moments = THPVariable_Unpack(arguments[4]);
  {
    pybind11::gil_scoped_release without_lock;
    at::NoGradGuard no_grad;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (kernel->copies) given[0] = given[0].clone(at::MemoryFormat::Preserve);
    if (residual) y = like(y, given[0]);
    const variable_list tensors(given.begin() + 1, given.begin() + 1 + kernel->orders.size());
    auto [dx, others, dresidual] =
        gradients(*kernel, dy, given[0], y, ordered(*kernel, moments, true), tensors, true, false);
    made = {dx};
    for (const Tensor &one : others) made.push_back(one.contiguous());
    if (residual) made.push_back(dresidual);
  }
  return list_of(made);
  END_HANDLE_TH_ERRORS
}

PyObject *program(PyObject *, PyObject *) {
  programs.emplace_back();
  return PyLong_FromSize_t(programs.size() - 1);
}

// add(program, reference, numbers): the numbers are lists, one after the other with their lengths.
PyObject *add(PyObject *, PyObject *const *arguments, Py_ssize_t) {
  HANDLE_TH_ERRORS
  PyObject *numbers = arguments[2];
  Py_ssize_t place = 0;
  const auto list = [&]() {
    Numbers result(PyLong_AsSize_t(PyList_GET_ITEM(numbers, place++)));
    for (int64_t &value : result) value = PyLong_AsLongLong(PyList_GET_ITEM(numbers, place++));
    return result;
  };
  auto kernel = c10::make_intrusive<Kernel>();
  kernel->reference = Py_NewRef(arguments[1]);
  kernel->shape = list(), kernel->strides = list(), kernel->counts = list(), kernel->dtypes = list();
  const Numbers plain = list();
  kernel->forward = reinterpret_cast<Function>(plain[0]);
  kernel->backward = reinterpret_cast<Function>(plain[1]);
  kernel->copies = plain[2] != 0, kernel->residual = plain[3] != 0;
  kernel->threads = plain[4], kernel->groups = plain[5], kernel->saved = plain[6], kernel->updates = plain[7];
  kernel->single = at::ScalarType(plain[8]), kernel->result = at::ScalarType(plain[9]);
  kernel->loops = list();
  const Numbers extents = list();
  kernel->extents.assign(extents.begin(), extents.end());
  kernel->free = list(), kernel->used = list(), kernel->firm = list(), kernel->copied = list();
  kernel->kept.sizes = list(), kernel->kept.places = list();
  kernel->orders.resize(plain[10]);
  for (Order &order : kernel->orders) order.sizes = list(), order.places = list();
  auto &kernels = programs[PyLong_AsSize_t(arguments[0])];
  if (kernels.size() == MOST) kernels.pop_back();
  kernels.insert(kernels.begin(), std::move(kernel));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(call)), METH_FASTCALL, "Run a program."},
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(forward)), METH_FASTCALL, "The operator."},
    {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(backward)), METH_FASTCALL, "Its backward."},
    {"program", program, METH_NOARGS, "A new program without kernels."},
    {"add", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(add)), METH_FASTCALL, "Give it one."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "bnrewrite_runtime", nullptr, -1, methods};

} // namespace

PyMODINIT_FUNC PyInit_bnrewrite_runtime() { return PyModule_Create(&module); }

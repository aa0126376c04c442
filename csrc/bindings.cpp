// The only file that knows Python. Tensors arrive as TensorView (see parrot_kernels/native.py), never as torch
// objects; arguments are checked and outputs allocated by parrot_kernels/ops before they get here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace parrot;
using Optional = std::optional<TensorView>;

namespace {

std::unordered_map<PyObject*, DType> dtypes;  // of torch, which has one object for each

}  // namespace

// A tensor of torch, by what Python code would read of it.
template <>
struct py::detail::type_caster<TensorView> {
    PYBIND11_TYPE_CASTER(TensorView, const_name("torch.Tensor"));

    bool load(handle tensor, bool) {
        static PyObject* const names[] = {PyUnicode_InternFromString("dtype"), PyUnicode_InternFromString("data_ptr"),
                                          PyUnicode_InternFromString("shape"), PyUnicode_InternFromString("stride")};
        const auto dtype = checked(PyObject_GetAttr(tensor.ptr(), names[0]));
        const auto found = dtypes.find(dtype.ptr());
        if (found == dtypes.end()) return false;
        const auto address = checked(PyObject_CallMethodNoArgs(tensor.ptr(), names[1]));
        const auto shape = checked(PyObject_GetAttr(tensor.ptr(), names[2]));
        const auto stride = checked(PyObject_CallMethodNoArgs(tensor.ptr(), names[3]));
        const Py_ssize_t ndim = PyTuple_Check(shape.ptr()) ? PyTuple_GET_SIZE(shape.ptr()) : -1;
        if (ndim < 0 || ndim > kMaxDims || !PyTuple_Check(stride.ptr()) || PyTuple_GET_SIZE(stride.ptr()) != ndim)
            return false;
        value.data = PyLong_AsVoidPtr(address.ptr());
        value.dtype = found->second;
        value.ndim = static_cast<int>(ndim);
        for (Py_ssize_t i = 0; i < ndim; ++i) {
            value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
            value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
        }
        if (PyErr_Occurred()) throw error_already_set();
        return true;
    }

  private:
    static object checked(PyObject* result) {
        if (!result) throw error_already_set();
        return reinterpret_steal<object>(result);
    }
};

namespace {

TensorView given(const Optional& view) { return view.value_or(TensorView{}); }

CostKind cost_kind(const std::string& name) {
    if (name == "euclidean") return CostKind::euclidean;
    if (name == "sqeuclidean") return CostKind::sqeuclidean;
    if (name == "cosine") return CostKind::cosine;
    if (name == "matrix") return CostKind::matrix;
    throw std::invalid_argument("unknown cost " + name);
}

constexpr double kBalanced = std::numeric_limits<double>::infinity();

// Arguments of the Sinkhorn kernels, in the order of SINKHORN_*_ARGUMENTS.
#define SINKHORN_FORWARD_PARAMETERS                                                                                   \
    TensorView x, TensorView y, Optional a, Optional b, Optional x_lengths, Optional y_lengths, Optional cost_matrix, \
        TensorView eps, const std::string &cost, std::optional<double> cost_scale, int n_iters,                       \
        std::optional<double> tol, std::optional<double> rho_x, std::optional<double> rho_y, Optional x_to_y,         \
        Optional y_to_x, Optional x_hadamard, Optional y_hadamard, TensorView f, TensorView g, Optional plan,         \
        TensorView transport_cost, TensorView error, TensorView iterations, TensorView converged, TensorView scale,   \
        Optional f_history, Optional g_history
#define SINKHORN_FORWARD_ARGUMENTS                                                                                     \
    py::kw_only(), py::arg("x"), py::arg("y"), py::arg("a"), py::arg("b"), py::arg("x_lengths"), py::arg("y_lengths"), \
        py::arg("cost_matrix"), py::arg("eps"), py::arg("cost"), py::arg("cost_scale"), py::arg("n_iters"),            \
        py::arg("tol"), py::arg("rho_x"), py::arg("rho_y"), py::arg("x_to_y"), py::arg("y_to_x"),                      \
        py::arg("x_hadamard"), py::arg("y_hadamard"), py::arg("f"), py::arg("g"), py::arg("plan"),                     \
        py::arg("transport_cost"), py::arg("error"), py::arg("iterations"), py::arg("converged"), py::arg("scale"),    \
        py::arg("f_history"), py::arg("g_history")
#define SET_SINKHORN_FORWARD(p)                                                                                       \
    p.x = x, p.y = y, p.a = given(a), p.b = given(b), p.x_lengths = given(x_lengths), p.y_lengths = given(y_lengths); \
    p.cost_matrix = given(cost_matrix), p.eps = eps, p.cost = cost_kind(cost),                                        \
    p.cost_scale = cost_scale.value_or(0.0);                                                                          \
    p.n_iters = n_iters, p.tol = tol.value_or(-1.0), p.rho_x = rho_x.value_or(kBalanced);                             \
    p.rho_y = rho_y.value_or(kBalanced), p.x_to_y = given(x_to_y), p.y_to_x = given(y_to_x),                          \
    p.x_hadamard = given(x_hadamard);                                                                                 \
    p.y_hadamard = given(y_hadamard), p.f = f, p.g = g, p.plan = given(plan), p.transport_cost = transport_cost;      \
    p.error = error, p.iterations = iterations, p.converged = converged, p.scale = scale;                             \
    p.f_history = given(f_history), p.g_history = given(g_history)
#define SINKHORN_BACKWARD_PARAMETERS                                                                                  \
    TensorView x, TensorView y, Optional a, Optional b, Optional x_lengths, Optional y_lengths, Optional cost_matrix, \
        TensorView eps, const std::string &cost, std::optional<double> rho_x, std::optional<double> rho_y,            \
        const std::string &gradient, TensorView f, TensorView g, TensorView scale, TensorView iterations,             \
        Optional f_history, Optional g_history, Optional grad_x_to_y, Optional grad_y_to_x, Optional grad_x_hadamard, \
        Optional grad_y_hadamard, Optional grad_f, Optional grad_g, Optional grad_plan, Optional grad_transport_cost, \
        Optional dx, Optional dy, Optional dcost_matrix, Optional da, Optional db, Optional deps
#define SINKHORN_BACKWARD_ARGUMENTS                                                                                    \
    py::kw_only(), py::arg("x"), py::arg("y"), py::arg("a"), py::arg("b"), py::arg("x_lengths"), py::arg("y_lengths"), \
        py::arg("cost_matrix"), py::arg("eps"), py::arg("cost"), py::arg("rho_x"), py::arg("rho_y"),                   \
        py::arg("gradient"), py::arg("f"), py::arg("g"), py::arg("scale"), py::arg("iterations"),                      \
        py::arg("f_history"), py::arg("g_history"), py::arg("grad_x_to_y"), py::arg("grad_y_to_x"),                    \
        py::arg("grad_x_hadamard"), py::arg("grad_y_hadamard"), py::arg("grad_f"), py::arg("grad_g"),                  \
        py::arg("grad_plan"), py::arg("grad_transport_cost"), py::arg("dx"), py::arg("dy"), py::arg("dcost_matrix"),   \
        py::arg("da"), py::arg("db"), py::arg("deps")
#define SET_SINKHORN_BACKWARD(p)                                                                                      \
    if (gradient != "unrolled" && gradient != "detached")                                                             \
        throw std::invalid_argument("sinkhorn_hadamard: no gradient " + gradient);                                    \
    p.x = x, p.y = y, p.a = given(a), p.b = given(b), p.x_lengths = given(x_lengths), p.y_lengths = given(y_lengths); \
    p.cost_matrix = given(cost_matrix), p.eps = eps, p.cost = cost_kind(cost), p.rho_x = rho_x.value_or(kBalanced);   \
    p.rho_y = rho_y.value_or(kBalanced), p.unrolled = gradient == "unrolled";                                         \
    p.f = f, p.g = g, p.scale = scale, p.iterations = iterations;                                                     \
    p.f_history = given(f_history), p.g_history = given(g_history), p.grad_x_to_y = given(grad_x_to_y);               \
    p.grad_y_to_x = given(grad_y_to_x), p.grad_x_hadamard = given(grad_x_hadamard);                                   \
    p.grad_y_hadamard = given(grad_y_hadamard), p.grad_f = given(grad_f), p.grad_g = given(grad_g);                   \
    p.grad_plan = given(grad_plan), p.grad_transport_cost = given(grad_transport_cost), p.dx = given(dx);             \
    p.dy = given(dy), p.dcost_matrix = given(dcost_matrix), p.da = given(da), p.db = given(db), p.deps = given(deps)

void bind_sinkhorn_hadamard(py::module_& m) {
    m.def(
        "sinkhorn_hadamard_forward",
        [](SINKHORN_FORWARD_PARAMETERS, int64_t workspace_limit, int num_threads) {
            SinkhornHadamardForward p;
            SET_SINKHORN_FORWARD(p);
            p.workspace_limit = workspace_limit, p.num_threads = num_threads;
            py::gil_scoped_release release;
            cpu::sinkhorn_hadamard_forward(p);
        },
        SINKHORN_FORWARD_ARGUMENTS, py::arg("workspace_limit") = SinkhornHadamardForward{}.workspace_limit,
        py::arg("num_threads"));
    m.def(
        "sinkhorn_hadamard_backward",
        [](SINKHORN_BACKWARD_PARAMETERS, int64_t workspace_limit, int num_threads) {
            SinkhornHadamardBackward p;
            SET_SINKHORN_BACKWARD(p);
            p.workspace_limit = workspace_limit, p.num_threads = num_threads;
            py::gil_scoped_release release;
            cpu::sinkhorn_hadamard_backward(p);
        },
        SINKHORN_BACKWARD_ARGUMENTS, py::arg("workspace_limit") = SinkhornHadamardBackward{}.workspace_limit,
        py::arg("num_threads"));
#ifdef PARROT_WITH_CUDA
    m.def(
        "sinkhorn_hadamard_forward_cuda",
        [](SINKHORN_FORWARD_PARAMETERS, Optional x_copy, Optional y_copy, Optional paired_hadamard, uintptr_t stream) {
            SinkhornHadamardForward p;
            SET_SINKHORN_FORWARD(p);
            p.x_copy = given(x_copy), p.y_copy = given(y_copy), p.paired_hadamard = given(paired_hadamard);
            p.stream = reinterpret_cast<void*>(stream);
            const char* failure = cuda::sinkhorn_hadamard_forward(p);
            if (failure) throw std::runtime_error(std::string("sinkhorn_hadamard (cuda): ") + failure);
        },
        SINKHORN_FORWARD_ARGUMENTS, py::arg("x_copy") = py::none(), py::arg("y_copy") = py::none(),
        py::arg("paired_hadamard") = py::none(), py::arg("stream"));
    m.def(
        "sinkhorn_hadamard_backward_cuda",
        [](SINKHORN_BACKWARD_PARAMETERS, Optional grad_x_copy, Optional grad_y_copy, Optional grad_paired_hadamard,
           Optional workspace, uintptr_t stream) {
            SinkhornHadamardBackward p;
            SET_SINKHORN_BACKWARD(p);
            p.grad_x_copy = given(grad_x_copy), p.grad_y_copy = given(grad_y_copy);
            p.grad_paired_hadamard = given(grad_paired_hadamard);
            p.workspace = given(workspace);
            p.stream = reinterpret_cast<void*>(stream);
            const char* failure = cuda::sinkhorn_hadamard_backward(p);
            if (failure) throw std::runtime_error(std::string("sinkhorn_hadamard (cuda): ") + failure);
        },
        SINKHORN_BACKWARD_ARGUMENTS, py::arg("grad_x_copy") = py::none(), py::arg("grad_y_copy") = py::none(),
        py::arg("grad_paired_hadamard") = py::none(), py::arg("workspace"), py::arg("stream"));
    m.def("sinkhorn_hadamard_needs_workspace", &cuda::sinkhorn_hadamard_needs_workspace, py::kw_only(), py::arg("N"),
          py::arg("M"), py::arg("wide"));
    m.def("sinkhorn_hadamard_shared_memory", &cuda::sinkhorn_hadamard_shared_memory, py::kw_only(), py::arg("N"),
          py::arg("M"), py::arg("wide"));
    m.def("shared_memory_limit", &cuda::shared_memory_limit);
#endif
}

// The inputs of the selective scan, in the order of SCAN_INPUTS.
#define SCAN_PARAMETERS                                                                               \
    TensorView u, TensorView delta, TensorView A, TensorView B, TensorView C, Optional D, Optional z, \
        Optional delta_bias, bool delta_softplus, bool reverse, Optional lengths, Optional seq_idx,   \
        Optional initial_state
#define SCAN_INPUTS                                                                                             \
    py::kw_only(), py::arg("u"), py::arg("delta"), py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D"),      \
        py::arg("z"), py::arg("delta_bias"), py::arg("delta_softplus"), py::arg("reverse"), py::arg("lengths"), \
        py::arg("seq_idx"), py::arg("initial_state")
#define SET_SCAN_INPUTS(p)                                                                    \
    p.u = u, p.delta = delta, p.A = A, p.B = B, p.C = C, p.D = given(D), p.z = given(z);      \
    p.delta_bias = given(delta_bias), p.lengths = given(lengths), p.seq_idx = given(seq_idx); \
    p.initial_state = given(initial_state), p.delta_softplus = delta_softplus, p.reverse = reverse

void bind_selective_scan(py::module_& m) {
    m.def(
        "selective_scan_forward",
        [](SCAN_PARAMETERS, int64_t chunk_size, TensorView out, TensorView final_state, Optional checkpoints,
           int num_threads) {
            SelectiveScanForward p;
            SET_SCAN_INPUTS(p);
            p.out = out, p.final_state = final_state, p.checkpoints = given(checkpoints), p.chunk_size = chunk_size;
            p.num_threads = num_threads;
            py::gil_scoped_release release;
            cpu::selective_scan_forward(p);
        },
        SCAN_INPUTS, py::arg("chunk_size"), py::arg("out"), py::arg("final_state"), py::arg("checkpoints"),
        py::arg("num_threads"));
    m.def(
        "selective_scan_backward",
        [](SCAN_PARAMETERS, Optional grad_out, Optional grad_final_state, int64_t chunk_size, Optional checkpoints,
           TensorView du, TensorView ddelta, TensorView dA, TensorView dB, TensorView dC, Optional dD, Optional dz,
           Optional ddelta_bias, Optional dinitial_state, int num_threads) {
            SelectiveScanBackward p;
            SET_SCAN_INPUTS(p);
            p.grad_out = given(grad_out), p.grad_final_state = given(grad_final_state);
            p.checkpoints = given(checkpoints), p.chunk_size = chunk_size;
            p.du = du, p.ddelta = ddelta, p.dA = dA, p.dB = dB, p.dC = dC, p.dD = given(dD), p.dz = given(dz);
            p.ddelta_bias = given(ddelta_bias), p.dinitial_state = given(dinitial_state);
            p.num_threads = num_threads;
            py::gil_scoped_release release;
            cpu::selective_scan_backward(p);
        },
        SCAN_INPUTS, py::arg("grad_out"), py::arg("grad_final_state"), py::arg("chunk_size"), py::arg("checkpoints"),
        py::arg("du"), py::arg("ddelta"), py::arg("dA"), py::arg("dB"), py::arg("dC"), py::arg("dD"), py::arg("dz"),
        py::arg("ddelta_bias"), py::arg("dinitial_state"), py::arg("num_threads"));
#ifdef PARROT_WITH_CUDA
    m.def(
        "selective_scan_forward_cuda",
        [](SCAN_PARAMETERS, int64_t chunk_size, TensorView out, TensorView final_state, Optional checkpoints,
           Optional workspace, uintptr_t stream) {
            SelectiveScanForward p;
            SET_SCAN_INPUTS(p);
            p.out = out, p.final_state = final_state, p.checkpoints = given(checkpoints), p.chunk_size = chunk_size;
            p.workspace = given(workspace);
            p.stream = reinterpret_cast<void*>(stream);
            const char* failure = cuda::selective_scan_forward(p);
            if (failure) throw std::runtime_error(std::string("selective_scan (cuda): ") + failure);
        },
        SCAN_INPUTS, py::arg("chunk_size"), py::arg("out"), py::arg("final_state"), py::arg("checkpoints"),
        py::arg("workspace"), py::arg("stream"));
    m.def(
        "selective_scan_backward_cuda",
        [](SCAN_PARAMETERS, Optional grad_out, Optional grad_final_state, int64_t chunk_size, TensorView checkpoints,
           TensorView du, TensorView ddelta, TensorView dA, TensorView dB, TensorView dC, Optional dD, Optional dz,
           Optional ddelta_bias, Optional dinitial_state, TensorView workspace, uintptr_t stream) {
            SelectiveScanBackward p;
            SET_SCAN_INPUTS(p);
            p.grad_out = given(grad_out), p.grad_final_state = given(grad_final_state);
            p.checkpoints = checkpoints, p.chunk_size = chunk_size;
            p.du = du, p.ddelta = ddelta, p.dA = dA, p.dB = dB, p.dC = dC, p.dD = given(dD), p.dz = given(dz);
            p.ddelta_bias = given(ddelta_bias), p.dinitial_state = given(dinitial_state);
            p.workspace = workspace, p.stream = reinterpret_cast<void*>(stream);
            const char* failure = cuda::selective_scan_backward(p);
            if (failure) throw std::runtime_error(std::string("selective_scan (cuda): ") + failure);
        },
        SCAN_INPUTS, py::arg("grad_out"), py::arg("grad_final_state"), py::arg("chunk_size"), py::arg("checkpoints"),
        py::arg("du"), py::arg("ddelta"), py::arg("dA"), py::arg("dB"), py::arg("dC"), py::arg("dD"), py::arg("dz"),
        py::arg("ddelta_bias"), py::arg("dinitial_state"), py::arg("workspace"), py::arg("stream"));
    m.def("selective_scan_backward_workspace_cuda", &cuda::selective_scan_backward_workspace, py::kw_only(),
          py::arg("u"), py::arg("A"), py::arg("B"), py::arg("C"));
    m.def("selective_scan_workspace_cuda", &cuda::selective_scan_workspace, py::kw_only(), py::arg("batch"),
          py::arg("dim"), py::arg("groups"), py::arg("length"), py::arg("state"));
#endif
}

void bind_causal_conv1d(py::module_& m) {
    m.def(
        "causal_conv1d_forward",
        [](TensorView x, TensorView weight, Optional bias, bool silu, bool reverse, Optional lengths, Optional seq_idx,
           Optional initial_state, TensorView out, TensorView final_state, int num_threads) {
            CausalConv1dForward p;
            p.x = x, p.weight = weight, p.bias = given(bias), p.lengths = given(lengths), p.seq_idx = given(seq_idx);
            p.initial_state = given(initial_state), p.silu = silu, p.reverse = reverse;
            p.out = out, p.final_state = final_state, p.num_threads = num_threads;
            py::gil_scoped_release release;
            cpu::causal_conv1d_forward(p);
        },
        py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("silu"), py::arg("reverse"),
        py::arg("lengths"), py::arg("seq_idx"), py::arg("initial_state"), py::arg("out"), py::arg("final_state"),
        py::arg("num_threads"));
    m.def(
        "causal_conv1d_backward",
        [](Optional grad_out, Optional grad_final_state, TensorView x, TensorView weight, Optional bias, bool silu,
           bool reverse, Optional lengths, Optional seq_idx, Optional initial_state, TensorView dx, TensorView dweight,
           Optional dbias, Optional dinitial_state, int num_threads) {
            CausalConv1dBackward p;
            p.x = x, p.weight = weight, p.bias = given(bias), p.lengths = given(lengths), p.seq_idx = given(seq_idx);
            p.initial_state = given(initial_state), p.silu = silu, p.reverse = reverse;
            p.grad_out = given(grad_out), p.grad_final_state = given(grad_final_state);
            p.dx = dx, p.dweight = dweight, p.dbias = given(dbias), p.dinitial_state = given(dinitial_state);
            p.num_threads = num_threads;
            py::gil_scoped_release release;
            cpu::causal_conv1d_backward(p);
        },
        py::kw_only(), py::arg("grad_out"), py::arg("grad_final_state"), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("silu"), py::arg("reverse"), py::arg("lengths"), py::arg("seq_idx"),
        py::arg("initial_state"), py::arg("dx"), py::arg("dweight"), py::arg("dbias"), py::arg("dinitial_state"),
        py::arg("num_threads"));
#ifdef PARROT_WITH_CUDA
    m.def(
        "causal_conv1d_forward_cuda",
        [](TensorView x, TensorView weight, Optional bias, bool silu, bool reverse, Optional lengths, Optional seq_idx,
           Optional initial_state, TensorView out, TensorView final_state, uintptr_t stream) {
            CausalConv1dForward p;
            p.x = x, p.weight = weight, p.bias = given(bias), p.lengths = given(lengths), p.seq_idx = given(seq_idx);
            p.initial_state = given(initial_state), p.silu = silu, p.reverse = reverse;
            p.out = out, p.final_state = final_state, p.stream = reinterpret_cast<void*>(stream);
            const char* failure = cuda::causal_conv1d_forward(p);
            if (failure) throw std::runtime_error(std::string("causal_conv1d (cuda): ") + failure);
        },
        py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("silu"), py::arg("reverse"),
        py::arg("lengths"), py::arg("seq_idx"), py::arg("initial_state"), py::arg("out"), py::arg("final_state"),
        py::arg("stream"));
    m.def(
        "causal_conv1d_backward_cuda",
        [](Optional grad_out, Optional grad_final_state, TensorView x, TensorView weight, Optional bias, bool silu,
           bool reverse, Optional lengths, Optional seq_idx, Optional initial_state, TensorView dx, TensorView dweight,
           Optional dbias, Optional dinitial_state, TensorView workspace, uintptr_t stream) {
            CausalConv1dBackward p;
            p.x = x, p.weight = weight, p.bias = given(bias), p.lengths = given(lengths), p.seq_idx = given(seq_idx);
            p.initial_state = given(initial_state), p.silu = silu, p.reverse = reverse;
            p.grad_out = given(grad_out), p.grad_final_state = given(grad_final_state);
            p.dx = dx, p.dweight = dweight, p.dbias = given(dbias), p.dinitial_state = given(dinitial_state);
            p.workspace = workspace, p.stream = reinterpret_cast<void*>(stream);
            const char* failure = cuda::causal_conv1d_backward(p);
            if (failure) throw std::runtime_error(std::string("causal_conv1d (cuda): ") + failure);
        },
        py::kw_only(), py::arg("grad_out"), py::arg("grad_final_state"), py::arg("x"), py::arg("weight"),
        py::arg("bias"), py::arg("silu"), py::arg("reverse"), py::arg("lengths"), py::arg("seq_idx"),
        py::arg("initial_state"), py::arg("dx"), py::arg("dweight"), py::arg("dbias"), py::arg("dinitial_state"),
        py::arg("workspace"), py::arg("stream"));
    m.def("causal_conv1d_workspace_cuda", &cuda::causal_conv1d_workspace, py::kw_only(), py::arg("x"),
          py::arg("weight"));
#endif
}

#define STATE_UPDATE_PARAMETERS                                                                                      \
    TensorView state, TensorView x, TensorView dt, TensorView A, TensorView B, TensorView C, Optional D, Optional z, \
        Optional dt_bias, bool dt_softplus, Optional indices, TensorView out
#define STATE_UPDATE_ARGUMENTS                                                                              \
    py::kw_only(), py::arg("state"), py::arg("x"), py::arg("dt"), py::arg("A"), py::arg("B"), py::arg("C"), \
        py::arg("D"), py::arg("z"), py::arg("dt_bias"), py::arg("dt_softplus"), py::arg("indices"), py::arg("out")
#define SET_STATE_UPDATE(p)                                                                         \
    p.state = state, p.x = x, p.dt = dt, p.A = A, p.B = B, p.C = C, p.D = given(D), p.z = given(z); \
    p.dt_bias = given(dt_bias), p.dt_softplus = dt_softplus, p.indices = given(indices), p.out = out

void bind_selective_state_update(py::module_& m) {
    m.def(
        "selective_state_update",
        [](STATE_UPDATE_PARAMETERS, int num_threads) {
            SelectiveStateUpdate p;
            SET_STATE_UPDATE(p);
            p.num_threads = num_threads;
            py::gil_scoped_release release;
            cpu::selective_state_update(p);
        },
        STATE_UPDATE_ARGUMENTS, py::arg("num_threads"));
#ifdef PARROT_WITH_CUDA
    m.def(
        "selective_state_update_cuda",
        [](STATE_UPDATE_PARAMETERS, uintptr_t stream) {
            SelectiveStateUpdate p;
            SET_STATE_UPDATE(p);
            p.stream = reinterpret_cast<void*>(stream);
            const char* failure = cuda::selective_state_update(p);
            if (failure) throw std::runtime_error(std::string("selective_state_update (cuda): ") + failure);
        },
        STATE_UPDATE_ARGUMENTS, py::arg("stream"));
#endif
}

#define CONV_UPDATE_PARAMETERS                                                                                    \
    TensorView x, TensorView state, TensorView weight, Optional bias, bool silu, Optional seen, Optional indices, \
        TensorView out
#define CONV_UPDATE_ARGUMENTS                                                                           \
    py::kw_only(), py::arg("x"), py::arg("state"), py::arg("weight"), py::arg("bias"), py::arg("silu"), \
        py::arg("seen"), py::arg("indices"), py::arg("out")
#define SET_CONV_UPDATE(p)                                                                                  \
    p.x = x, p.state = state, p.weight = weight, p.bias = given(bias), p.silu = silu, p.seen = given(seen); \
    p.indices = given(indices), p.out = out

void bind_causal_conv1d_update(py::module_& m) {
    m.def(
        "causal_conv1d_update",
        [](CONV_UPDATE_PARAMETERS, int num_threads) {
            CausalConv1dUpdate p;
            SET_CONV_UPDATE(p);
            p.num_threads = num_threads;
            py::gil_scoped_release release;
            cpu::causal_conv1d_update(p);
        },
        CONV_UPDATE_ARGUMENTS, py::arg("num_threads"));
#ifdef PARROT_WITH_CUDA
    m.def(
        "causal_conv1d_update_cuda",
        [](CONV_UPDATE_PARAMETERS, uintptr_t stream) {
            CausalConv1dUpdate p;
            SET_CONV_UPDATE(p);
            p.stream = reinterpret_cast<void*>(stream);
            const char* failure = cuda::causal_conv1d_update(p);
            if (failure) throw std::runtime_error(std::string("causal_conv1d_update (cuda): ") + failure);
        },
        CONV_UPDATE_ARGUMENTS, py::arg("stream"));
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of parrot_kernels; call them through parrot_kernels.ops.";
    m.def("register_dtype", [](py::handle dtype, int code) { dtypes[dtype.ptr()] = static_cast<DType>(code); });
    m.attr("isa") = cpu::isa();
    bind_sinkhorn_hadamard(m);
    bind_selective_scan(m);
    bind_selective_state_update(m);
    bind_causal_conv1d(m);
    bind_causal_conv1d_update(m);
#ifdef PARROT_WITH_CUDA
    m.attr("has_cuda") = true;
#else
    m.attr("has_cuda") = false;
#endif
}

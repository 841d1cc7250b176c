#include "grads.h"

#include "dtensor.h"
#include "tensors.h"

namespace py = pybind11;

namespace adamw_ext::python {
namespace {

py::object wrapped(c10::TensorImpl* tensor) {
  using TensorPtr = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  return py::reinterpret_steal<py::object>(wrap(at::Tensor(TensorPtr::reclaim_copy(tensor))));
}

}  // namespace

void Grads::add(const py::object& grad) {
  if (grad.is_none()) {
    list_.emplace_back();
    return;
  }
  const bool is_sharded = is_dtensor(grad.ptr());
  auto object = is_sharded ? py::reinterpret_borrow<py::object>(local_tensor_of(grad.ptr())) : grad;
  if (!object) throw py::type_error("a gradient has no part in this process");
  list_.push_back(Borrowing::createBorrow(to_tensor(object, "a gradient")));
  objects_.push_back(std::move(object));
}

void Grads::clear() {
  for (at::Tensor& grad : list_) Borrowing::destroyBorrow(grad);
  list_.clear();
  objects_.clear();
}

Sharded::Sharded(const py::tuple& members) {
  for (const py::handle item : members) {
    const auto fields = item.cast<py::tuple>();
    const py::object param = fields[0];
    const bool is_sharded = is_dtensor(param.ptr());
    any_ |= is_sharded;
    py::object spec;
    if (is_sharded) {
      spec = py::reinterpret_borrow<py::object>(spec_of(param.ptr()));
      if (!spec) throw py::type_error(fields[3].cast<std::string>() + " is a DTensor without a placement");
    }
    params_.push_back({unpack(param.ptr()).unsafeGetTensorImpl(), std::move(spec), fields[3]});
  }
}

bool Sharded::read_grads(const py::object& place, Grads& grads) const {
  bool placed = false;
  for (const Param& param : params_) {
    const at::Tensor& grad = param.tensor->grad();
    auto object = grad.defined() ? py::reinterpret_steal<py::object>(wrap(grad)) : py::none();
    if (param.spec && grad.defined()) {
      PyObject* spec = is_dtensor(object.ptr()) ? spec_of(object.ptr()) : nullptr;
      if (spec == nullptr || !same_placement(param.spec.ptr(), spec)) {
        placed = true;
        object = place(wrapped(param.tensor), object, param.name);
      }
    }
    grads.add(object);
  }
  return placed;
}

void Sharded::bump_versions(const Grads& grads) const {
  for (std::size_t i = 0; i < params_.size(); ++i) {
    if (params_[i].spec && grads.list()[i].defined()) params_[i].tensor->bump_version();
  }
}

}  // namespace adamw_ext::python

// The CPU handler of calls on one layer of stacks: any other op's handler, with operands [L, ...] moved to the layer
// that a scalar operand names. Nothing is copied, and the op's handler sees the operands of one layer.
#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ffi/contract.h"
#include "ffi/cpu_op.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace jax_marlin_moe {
namespace {

// Attributes of the call itself; all others are those of the op.
constexpr std::string_view kTargetAttribute = "layer_target";  // the target of the op's own calls
constexpr std::string_view kOperandsAttribute =
    "layer_operands";  // int64: a stack's operand, the operand of its index, ...

std::string_view View(const XLA_FFI_ByteSpan& span) { return {span.ptr, span.len}; }

std::string TargetOf(const CpuOp& op) {
  return "jax_marlin_moe." + std::string(op.name) + ".cpu.v" + std::to_string(op.version);
}

// The call that the op's handler gets. It owns what it changes; all else is of the frame that it is made of.
class InnerCall {
 public:
  InnerCall(Contract& contract, const XLA_FFI_CallFrame& outer) : frame_(outer) {
    const XLA_FFI_ByteSpan* target = nullptr;
    const XLA_FFI_Array* operands = nullptr;
    for (int64_t a = 0; a < outer.attrs.size; ++a) {
      const std::string_view name = View(*outer.attrs.names[a]);
      const XLA_FFI_AttrType type = outer.attrs.types[a];
      if (name == kTargetAttribute && type == XLA_FFI_AttrType_STRING) {
        target = static_cast<const XLA_FFI_ByteSpan*>(outer.attrs.attrs[a]);
      } else if (name == kOperandsAttribute && type == XLA_FFI_AttrType_ARRAY) {
        operands = static_cast<const XLA_FFI_Array*>(outer.attrs.attrs[a]);
      } else {
        types_.push_back(type);
        names_.push_back(outer.attrs.names[a]);
        attributes_.push_back(outer.attrs.attrs[a]);
      }
    }
    contract.Require(target != nullptr, "there is no string layer_target");
    contract.Require(
        operands != nullptr && operands->dtype == XLA_FFI_DataType_S64 && operands->size > 0 && operands->size % 2 == 0,
        "layer_operands must be pairs of int64");
    if (!contract.ok()) return;
    for (const CpuOp* op = CpuOp::First(); op != nullptr; op = op->next) {
      if (TargetOf(*op) == View(*target)) handler_ = op->handler;
    }
    contract.Require(handler_ != nullptr, "layer_target is " + Quoted(View(*target)) + ", which this module has not");
    if (contract.ok()) MoveOperands(contract, outer, *operands);
  }
  InnerCall(const InnerCall&) = delete;
  InnerCall& operator=(const InnerCall&) = delete;

  XLA_FFI_Error* Run(XLA_FFI_CallFrame* outer) {
    XLA_FFI_Error* error = handler_(&frame_);
    outer->future = frame_.future;
    return error;
  }

 private:
  void MoveOperands(Contract& contract, const XLA_FFI_CallFrame& outer, const XLA_FFI_Array& places) {
    const auto* pairs = static_cast<const int64_t*>(places.data);
    const int64_t size = outer.args.size, count = static_cast<int64_t>(places.size) / 2;
    int64_t inner = size;  // operands of the op: those before the first index
    for (int64_t p = 0; p < count; ++p) inner = std::min(inner, pairs[2 * p + 1]);
    arguments_.assign(outer.args.args, outer.args.args + size);
    buffers_.reserve(static_cast<size_t>(count));
    for (int64_t p = 0; p < count && contract.ok(); ++p) {
      const int64_t place = pairs[2 * p], index_place = pairs[2 * p + 1];
      contract.Require(place >= 0 && place < inner && index_place >= 0 && index_place < size,
                       "layer_operands names operands " + std::to_string(place) + " and " +
                           std::to_string(index_place) + " of " + std::to_string(size));
      if (contract.ok()) Move(contract, place, *static_cast<const XLA_FFI_Buffer*>(outer.args.args[index_place]));
    }
    if (!contract.ok()) return;
    frame_.args.size = inner;
    frame_.args.args = arguments_.data();
    frame_.attrs.size = static_cast<int64_t>(attributes_.size());
    frame_.attrs.types = types_.data();
    frame_.attrs.names = names_.data();
    frame_.attrs.attrs = attributes_.data();
  }

  // Puts the layer in the place of the stack. An index that is out of range is clamped, as XLA's slices are.
  void Move(Contract& contract, int64_t place, const XLA_FFI_Buffer& index) {
    buffers_.push_back(*static_cast<const XLA_FFI_Buffer*>(arguments_[static_cast<size_t>(place)]));
    XLA_FFI_Buffer& buffer = buffers_.back();
    const ffi::AnyBuffer stack(&buffer);
    const std::string name = "operand " + std::to_string(place);
    contract.Require(index.dtype == XLA_FFI_DataType_S32 && index.rank == 0,
                     "the index of " + name + " must be one int32");
    const size_t width = ffi::ByteWidth(stack.element_type());
    contract.Require(width != 0, name + " has elements of no whole bytes");
    const int64_t layers = contract.Extent(stack, name, 0);
    contract.Require(layers > 0, name + " must be a stack of at least one layer");
    int64_t elements = 1;
    for (int64_t axis = 1; axis < buffer.rank; ++axis) {
      elements = contract.Product(name, {elements, contract.Extent(stack, name, static_cast<size_t>(axis))});
    }
    contract.Product(name, {layers, elements});
    if (!contract.ok()) return;
    const int64_t layer = std::clamp<int64_t>(*static_cast<const int32_t*>(index.data), 0, layers - 1);
    buffer.data = static_cast<char*>(buffer.data) + layer * elements * static_cast<int64_t>(width);
    buffer.rank -= 1;
    buffer.dims += 1;
    arguments_[static_cast<size_t>(place)] = &buffer;
  }

  XLA_FFI_CallFrame frame_;
  XLA_FFI_Handler* handler_ = nullptr;
  std::vector<XLA_FFI_AttrType> types_;
  std::vector<XLA_FFI_ByteSpan*> names_;
  std::vector<void*> attributes_;
  std::vector<void*> arguments_;
  std::vector<XLA_FFI_Buffer> buffers_;
};

ffi::Error Described() { return ffi::Error::Success(); }

XLA_FFI_Error* HandleLayerOfStack(XLA_FFI_CallFrame* frame) {
  // XLA asks a handler for its version before the first call; a handler without operands answers.
  if (frame->extension_start != nullptr) {
    XLA_FFI_DEFINE_HANDLER(described, Described, ffi::Ffi::Bind());
    return (*described)(frame);
  }
  Contract contract("layer_of_stack");
  InnerCall call(contract, *frame);
  if (!contract.ok()) {
    const std::string text = contract.ToError().message();
    XLA_FFI_Error_Create_Args error{};
    error.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
    error.errc = XLA_FFI_Error_Code_INVALID_ARGUMENT;
    error.message = text.c_str();
    return frame->api->XLA_FFI_Error_Create(&error);
  }
  return call.Run(frame);
}

const CpuOp kLayerOfStackOp("layer_of_stack", 1, HandleLayerOfStack);

}  // namespace
}  // namespace jax_marlin_moe

// Calls the CPU handlers as XLA would, with operands that are right, slightly wrong, or absurd.
//
//   cpu_handlers_fuzz SECONDS CALLS CALLERS FIRST_SEED
//
// Ends after SECONDS or CALLS handler calls, whichever comes first. A case is a pure function of its seed: valid
// operands of one op, random data, and up to three changes of structure. A call that is accepted is repeated into
// results that held other bytes before: both must end with the same bytes, so results are written whole and do not
// depend on timing. Memory errors, undefined behaviour and races are for the sanitizers to report; exit status 1 says
// that results differed, or that no case of some op was accepted, which would make all of this vacuous.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ffi/cpu_op.h"
#include "xla/ffi/api/c_api.h"

// What XLA keeps behind a pointer of its C interface.
struct XLA_FFI_Error {
  std::string message;
};

namespace jax_marlin_moe {
namespace {

// The thread pool, which call frames carry as a context: its type has another name in other versions of the headers.
struct Pool {
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<std::function<void()>> tasks;
  bool stopping = false;
  std::vector<std::thread> threads;

  explicit Pool(int count) {
    for (int i = 0; i < count; ++i) threads.emplace_back([this] { Serve(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stopping = true;
    }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
  }
  void Serve() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex);
      wake.wait(lock, [this] { return stopping || !tasks.empty(); });
      if (tasks.empty()) return;
      std::function<void()> task = std::move(tasks.front());
      tasks.pop_front();
      lock.unlock();
      task();
    }
  }
};

using Context = decltype(XLA_FFI_CallFrame::ctx);

Pool& PoolOf(Context context) { return *reinterpret_cast<Pool*>(context); }

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 0x632BE59BD9B4E019u) {}

  uint64_t Bits() {  // xorshift*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545F4914F6CDD1Du;
  }
  int64_t Below(int64_t bound) { return static_cast<int64_t>((Bits() >> 11) % static_cast<uint64_t>(bound)); }
  bool OneIn(int64_t n) { return Below(n) == 0; }
  template <class Type>
  Type Of(const std::vector<Type>& values) {
    return values[static_cast<size_t>(Below(static_cast<int64_t>(values.size())))];
  }

 private:
  uint64_t state_;
};

// How the data of an operand is drawn.
enum class Content { kNumbers, kWords, kIds, kSlots, kCount };

struct Tensor {
  XLA_FFI_DataType type;
  std::vector<int64_t> shape;
  Content content = Content::kNumbers;
};

struct Attribute {
  std::string name;
  XLA_FFI_AttrType kind = XLA_FFI_AttrType_SCALAR;
  XLA_FFI_DataType type = XLA_FFI_DataType_S64;
  int64_t number = 0;
  std::string text;
  std::vector<float> floats;
  std::vector<int64_t> places;  // of an array of int64
};

Attribute Number(std::string name, int64_t value) {
  Attribute attribute;
  attribute.name = std::move(name);
  attribute.number = value;
  return attribute;
}

Attribute Text(std::string name, std::string value) {
  Attribute attribute;
  attribute.name = std::move(name);
  attribute.kind = XLA_FFI_AttrType_STRING;
  attribute.text = std::move(value);
  return attribute;
}

struct Case {
  int op = 0;
  std::vector<Tensor> operands;
  std::vector<Tensor> results;
  std::vector<Attribute> attributes;  // by name, as XLA orders them
};

struct Op {
  const char* name;
  void (*draw)(Random& random, Case& out);
};

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Five operands and five attributes of one stack of matrices.
void AddMatrix(Random& random, int64_t experts, int64_t k, int64_t n, const std::string& prefix, Case& out) {
  const std::string code = random.Of<std::string>({"int4", "int8", "e2m1", "e4m3"});
  const bool integer = code[0] == 'i';
  const int64_t bits = code == "int4" || code == "e2m1" ? 4 : 8;
  const std::string scale = integer ? "float" : random.Of<std::string>({"float", "e4m3", "e8m0"});
  const std::string zeros = integer ? random.Of<std::string>({"none", "integer", "float"}) : "none";
  const XLA_FFI_DataType scale_type =
      scale == "float"
          ? random.Of<XLA_FFI_DataType>({XLA_FFI_DataType_BF16, XLA_FFI_DataType_F16, XLA_FFI_DataType_F32})
          : XLA_FFI_DataType_U8;
  const int64_t group = random.Of<int64_t>({16, 32, 64, 128, int64_t{1} << 40});
  const int64_t groups = group > k ? 1 : CeilDiv(k, group);
  const Tensor absent_words{XLA_FFI_DataType_S32, {0}}, absent_floats{XLA_FFI_DataType_F32, {0}};
  out.operands.push_back({XLA_FFI_DataType_S32, {experts, k / 16, n * bits / 2}, Content::kWords});
  out.operands.push_back({scale_type, {experts, groups, n}});
  if (zeros == "none") out.operands.push_back(absent_words);
  if (zeros == "integer") {
    out.operands.push_back({XLA_FFI_DataType_S32, {experts, groups, n * bits / 32}, Content::kWords});
  }
  if (zeros == "float") out.operands.push_back({scale_type, {experts, groups, n}});
  out.operands.push_back(random.OneIn(2) ? Tensor{XLA_FFI_DataType_F32, {experts, n / 64}} : absent_floats);
  out.operands.push_back(random.OneIn(2) ? Tensor{XLA_FFI_DataType_F32, {experts, n}} : absent_floats);
  out.attributes.push_back(Text(prefix + "code", code));
  out.attributes.push_back(Number(prefix + "group_size", group));
  out.attributes.push_back(Text(prefix + "scale", scale));
  out.attributes.push_back(Number(prefix + "zero_point", code == "int4" ? 8 : code == "int8" ? 128 : 0));
  out.attributes.push_back(Text(prefix + "zeros", zeros));
}

void DrawAlign(Random& random, Case& out) {
  const int64_t tokens = random.Of<int64_t>({0, 1, 5, 33}), top_k = random.Of<int64_t>({1, 2, 8});
  const int64_t experts = random.Of<int64_t>({1, 4, 11, (int64_t{1} << 31) - 1}), slots = tokens * top_k;
  const int64_t block = random.Of<int64_t>({1, 8, 48, 64});
  const int64_t length =
      slots < experts ? std::min(slots * block, slots + experts * (block - 1)) : slots + experts * (block - 1);
  const bool mapped = experts < 100 && random.OneIn(2);
  out.operands = {{XLA_FFI_DataType_S32, {tokens, top_k}, Content::kIds},
                  {XLA_FFI_DataType_S32, {mapped ? experts : 0}, Content::kIds}};
  out.results = {
      {XLA_FFI_DataType_S32, {length}}, {XLA_FFI_DataType_S32, {CeilDiv(length, block)}}, {XLA_FFI_DataType_S32, {1}}};
  out.attributes = {Number("block_size", block), Number("num_experts", experts)};
}

void DrawGemm(Random& random, Case& out) {
  const int64_t tokens = random.Of<int64_t>({0, 1, 5, 33}), top_k = random.Of<int64_t>({1, 2, 8});
  const int64_t k = 16 * random.Of<int64_t>({1, 2, 9, 33}), n = 64 * random.Of<int64_t>({1, 3, 9});
  const int64_t block = random.Of<int64_t>({1, 8, 64}), length = random.Of<int64_t>({0, 1, 8, 65, 300});
  const XLA_FFI_DataType type = random.OneIn(2) ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F16;
  const bool weighted = tokens > 0 && random.OneIn(2);
  out.operands = {{type, {tokens, k}}};
  AddMatrix(random, random.Of<int64_t>({1, 2, 5}), k, n, "", out);
  out.operands.push_back({XLA_FFI_DataType_F32, {weighted ? tokens * top_k : 0}});
  out.operands.push_back({XLA_FFI_DataType_S32, {length}, Content::kSlots});
  out.operands.push_back({XLA_FFI_DataType_S32, {CeilDiv(length, block)}, Content::kIds});
  out.operands.push_back({XLA_FFI_DataType_S32, {1}, Content::kCount});
  out.results = {{type, {tokens * top_k, n}}};
  Attribute multiply = Number("mul_topk_weights", weighted);
  multiply.type = XLA_FFI_DataType_PRED;
  out.attributes.insert(out.attributes.begin(), Number("block_size", block));
  // Names ascend: code, group_size, mul_topk_weights, scale, top_k, zero_point, zeros.
  out.attributes.insert(out.attributes.begin() + 3, multiply);
  out.attributes.insert(out.attributes.begin() + 5, Number("top_k", top_k));
}

void DrawBlock(Random& random, Case& out) {
  const int64_t tokens = random.Of<int64_t>({0, 1, 5, 20}), top_k = random.Of<int64_t>({1, 2, 8});
  const int64_t experts = random.Of<int64_t>({1, 2, 5});
  const int64_t hidden = 64 * random.Of<int64_t>({1, 2, 5}) - 16 * random.Below(2);
  const int64_t inner = 16 * random.Of<int64_t>({1, 4, 5, 17}), half = 64 * CeilDiv(inner, 64);
  const int64_t columns = 64 * CeilDiv(hidden, 64);
  const XLA_FFI_DataType type = random.OneIn(2) ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F16;
  const std::string activation = random.Of<std::string>({"silu", "swiglu", "gelu", "relu2", "swiglu_step", "situ"});
  Attribute parameters;
  parameters.name = "activation_parameters";
  parameters.kind = XLA_FFI_AttrType_ARRAY;
  parameters.type = XLA_FFI_DataType_F32;
  if (activation == "swiglu") parameters.floats = {7.0f, 1.702f, 1.0f};
  if (activation == "swiglu_step") parameters.floats = {7.0f};
  if (activation == "situ") parameters.floats = {4.0f, 25.0f};
  out.operands = {{type, {random.OneIn(3) ? tokens * top_k : tokens, hidden}}};
  Case down;
  AddMatrix(random, experts, hidden, (activation == "relu2" ? 1 : 2) * half, "gate_up_", out);
  AddMatrix(random, experts, inner, columns, "down_", down);
  out.operands.insert(out.operands.end(), down.operands.begin(), down.operands.end());
  out.operands.push_back({XLA_FFI_DataType_F32, {tokens, top_k}});
  out.operands.push_back({XLA_FFI_DataType_S32, {tokens, top_k}, Content::kIds});
  out.operands.push_back({XLA_FFI_DataType_S32, {random.OneIn(2) ? experts + 3 : 0}, Content::kIds});
  const std::string intermediate = random.Of<std::string>({"none", "none", "static_fp8", "dynamic_nvfp4"});
  out.operands.push_back({XLA_FFI_DataType_F32, {random.Below(2)}});
  out.operands.push_back({XLA_FFI_DataType_F32, {intermediate == "none" ? 0 : experts}});
  out.results = {{random.OneIn(3) ? XLA_FFI_DataType_F32 : type, {tokens, columns}}};
  out.attributes.insert(out.attributes.begin(), down.attributes.begin(), down.attributes.end());
  out.attributes.insert(out.attributes.begin(), {Text("activation", activation), parameters});
  out.attributes.push_back(Text("intermediate", intermediate));
}

void DrawDispatches(Random& random, Case& out) {
  const int64_t rows = random.Of<int64_t>({0, 1, 5, 33}), result_rows = random.Of<int64_t>({0, 1, 7, 40});
  const int64_t k = 16 * random.Of<int64_t>({1, 2, 9, 33}), n = 64 * random.Of<int64_t>({1, 3, 9});
  const XLA_FFI_DataType type = random.OneIn(2) ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F16;
  out.operands = {{type, {rows, k}}};
  AddMatrix(random, random.Of<int64_t>({1, 2, 5}), k, n, "", out);
  out.operands.push_back({XLA_FFI_DataType_S32, {random.Of<int64_t>({0, 1, 9, 50}), 4}, Content::kIds});
  out.results = {{type, {result_rows, n}}, {XLA_FFI_DataType_S32, {1}}};
}

void DrawProduct(Random& random, Case& out) {
  const int64_t rows = random.Of<int64_t>({0, 1, 5, 33}), slots_per_row = random.Of<int64_t>({1, 2, 8});
  const int64_t k = 16 * random.Of<int64_t>({1, 2, 9, 33}), n = 64 * random.Of<int64_t>({1, 3, 9});
  const XLA_FFI_DataType type = random.OneIn(2) ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F16;
  const bool is_transposed = random.OneIn(2);
  out.operands = {{type, {rows, is_transposed ? n : k}}};
  AddMatrix(random, random.Of<int64_t>({1, 2, 5}), k, n, "", out);
  out.operands.back().shape = {0};  // of the bias
  out.operands.push_back({XLA_FFI_DataType_S32, {rows * slots_per_row}, Content::kIds});
  out.results = {{random.OneIn(2) ? type : XLA_FFI_DataType_F32, {rows * slots_per_row, is_transposed ? k : n}}};
  Attribute transposed = Number("transposed", is_transposed);
  transposed.type = XLA_FFI_DataType_PRED;
  // Names ascend: code, group_size, scale, slots_per_row, transposed, zero_point, zeros.
  out.attributes.insert(out.attributes.begin() + 3, {Number("slots_per_row", slots_per_row), transposed});
}

std::string TargetOf(const char* name) {
  for (const CpuOp* op = CpuOp::First(); op != nullptr; op = op->next) {
    if (std::strcmp(op->name, name) == 0)
      return std::string("jax_marlin_moe.") + name + ".cpu.v" + std::to_string(op->version);
  }
  std::abort();
}

// A product or a block, some of whose operands are stacks of layers.
void DrawStacks(Random& random, Case& out) {
  const bool block = random.OneIn(2);
  (block ? DrawBlock : DrawGemm)(random, out);
  const int64_t layers = random.Of<int64_t>({1, 2, 3});
  Attribute operands;
  operands.name = "layer_operands";
  operands.kind = XLA_FFI_AttrType_ARRAY;
  const auto count = static_cast<int64_t>(out.operands.size());
  for (int64_t place = 0; place < count; ++place) {
    if (place != 1 && random.OneIn(2)) continue;
    std::vector<int64_t>& shape = out.operands[static_cast<size_t>(place)].shape;
    shape.insert(shape.begin(), layers);
    operands.places.insert(operands.places.end(), {place, count + random.Below(2)});
  }
  out.operands.insert(out.operands.end(), 2, {XLA_FFI_DataType_S32, {}, Content::kIds});
  // One index of the two may have no stack: then it is an operand of the op, which refuses it.
  out.attributes.insert(out.attributes.end(),
                        {operands, Text("layer_target", TargetOf(block ? "fused_moe" : "moe_gemm"))});
}

Attribute Flag(std::string name, bool value) {
  Attribute attribute = Number(std::move(name), value);
  attribute.type = XLA_FFI_DataType_PRED;
  return attribute;
}

// A float32 by its bits.
Attribute Float(std::string name, int64_t bits) {
  Attribute attribute = Number(std::move(name), bits);
  attribute.type = XLA_FFI_DataType_F32;
  return attribute;
}

void DrawLayer(Random& random, Case& out) {
  const int64_t tokens = random.Of<int64_t>({0, 1, 5, 20}), experts = random.Of<int64_t>({2, 4, 12});
  const int64_t top_k = random.Of<int64_t>({1, 2}), shared = random.Of<int64_t>({0, 1, 3});
  const int64_t hidden = 64 * random.Of<int64_t>({1, 2}), rows = hidden - 16 * random.Below(2);
  const int64_t inner = 16 * random.Of<int64_t>({1, 4, 5}), half = 64 * CeilDiv(inner, 64);
  const bool mapped = random.OneIn(3);
  const int64_t identity = random.OneIn(3) ? 1 : 0, routed = experts - identity;
  const int64_t local = mapped ? random.Of<int64_t>({1, 3}) : routed;
  const XLA_FFI_DataType type = random.OneIn(2) ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F16;
  const auto numbers = [&](bool there, std::vector<int64_t> shape) {
    const auto float_type =
        random.Of<XLA_FFI_DataType>({XLA_FFI_DataType_BF16, XLA_FFI_DataType_F16, XLA_FFI_DataType_F32});
    return Tensor{float_type, there ? std::move(shape) : std::vector<int64_t>{0}};
  };
  Attribute parameters;
  parameters.name = "activation_parameters";
  parameters.kind = XLA_FFI_AttrType_ARRAY;
  parameters.type = XLA_FFI_DataType_F32;
  out.operands = {{type, {tokens, hidden}}};
  AddMatrix(random, local, hidden, 2 * half, "gate_up_", out);
  AddMatrix(random, local, inner, hidden, "down_", out);
  if (shared > 0) {
    AddMatrix(random, shared, hidden, 2 * half, "shared_gate_up_", out);
    AddMatrix(random, shared, inner, hidden, "shared_down_", out);
  } else {
    for (int i = 0; i < 10; ++i) out.operands.push_back({XLA_FFI_DataType_S32, {0}});
  }
  out.operands.push_back({XLA_FFI_DataType_S32, {mapped ? routed : 0}, Content::kIds});
  out.operands.push_back(numbers(true, {rows, experts}));
  out.operands.push_back(numbers(random.OneIn(3), {tokens, rows}));
  for (int i = 0; i < 3; ++i) out.operands.push_back(numbers(random.OneIn(2), {experts}));
  out.operands.push_back(random.OneIn(3) ? Tensor{XLA_FFI_DataType_S32, {tokens, top_k}, Content::kIds}
                                         : Tensor{XLA_FFI_DataType_S32, {0}});
  out.operands.push_back(numbers(random.OneIn(2), {rows, 1}));
  out.operands.push_back(numbers(random.OneIn(3), {rows}));
  out.results = {{random.OneIn(3) ? XLA_FFI_DataType_F32 : type, {tokens, hidden}},
                 {XLA_FFI_DataType_F32, {tokens, top_k}},
                 {XLA_FFI_DataType_S32, {tokens, top_k}}};
  const std::string scoring =
      random.Of<std::string>({"softmax", "sigmoid", "sqrtsoftplus", "identity", "chosen_sigmoid", "sparsemixer"});
  const int64_t groups = random.Of<int64_t>({1, 2});
  const std::vector<Attribute> rule = {Text("activation", "silu"),
                                       parameters,
                                       Flag("apply_on_input", random.OneIn(3)),
                                       Number("identity_experts", identity),
                                       Float("jitter", 0x3C23D70A),
                                       Float("norm_epsilon", 0x358637BD),
                                       Number("num_groups", groups),
                                       Flag("renormalize", random.OneIn(2)),
                                       Float("renormalize_epsilon", random.OneIn(2) ? 0 : 0x1E3CE508),
                                       Float("scale", 0x40200000),
                                       Text("scoring", scoring),
                                       Float("soft_cap", random.OneIn(2) ? 0 : 0x40200000),
                                       Flag("softmax_after_topk", random.OneIn(3)),
                                       Flag("top2", random.OneIn(2)),
                                       Number("top_groups", 1 + random.Below(groups)),
                                       Number("top_k", top_k)};
  out.attributes.insert(out.attributes.end(), rule.begin(), rule.end());
  std::sort(out.attributes.begin(), out.attributes.end(),
            [](const Attribute& a, const Attribute& b) { return a.name < b.name; });
}

const Op kOps[] = {{"moe_align_block_size", DrawAlign},
                   {"moe_gemm", DrawGemm},
                   {"fused_moe", DrawBlock},
                   {"expert_gemm", DrawDispatches},
                   {"grouped_product", DrawProduct},
                   {"layer_of_stack", DrawStacks},
                   {"moe_layer", DrawLayer}};
constexpr int kOpCount = 7;

XLA_FFI_Handler* HandlerOf(const char* name) {
  for (const CpuOp* op = CpuOp::First(); op != nullptr; op = op->next) {
    if (std::strcmp(op->name, name) == 0) return op->handler;
  }
  std::fprintf(stderr, "%s has no CPU handler\n", name);
  std::abort();
}

// An extent that a program could state: near the old one, a usual one, or far beyond memory.
int64_t OtherExtent(Random& random, int64_t extent) {
  switch (random.Below(4)) {
    case 0:
      return extent > 0 && random.OneIn(2) ? extent - 1 : extent < (int64_t{1} << 62) ? extent + 1 : extent;
    case 1:
      return random.Of<int64_t>({0, 1, 2, 16, 64, 128});
    case 2:
      return extent / 2;
    default:
      return (int64_t{1} << random.Of<int64_t>({10, 30, 31, 32, 34, 47, 48, 49, 58, 60, 62})) - random.Below(2);
  }
}

void Change(Random& random, Case& out) {
  std::vector<Tensor>& list = random.OneIn(6) ? out.results : out.operands;
  Tensor& tensor = list[static_cast<size_t>(random.Below(static_cast<int64_t>(list.size())))];
  const size_t rank = tensor.shape.size();
  const size_t axis = rank == 0 ? 0 : static_cast<size_t>(random.Below(static_cast<int64_t>(rank)));
  switch (random.Below(10)) {
    case 0:
      tensor.type = random.Of<XLA_FFI_DataType>({XLA_FFI_DataType_S32, XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16,
                                                 XLA_FFI_DataType_F16, XLA_FFI_DataType_U8, XLA_FFI_DataType_S64,
                                                 XLA_FFI_DataType_PRED});
      return;
    case 1:
      tensor.shape.insert(tensor.shape.begin() + static_cast<int64_t>(axis), random.Below(3));
      return;
    case 2:
      if (rank > 0) tensor.shape.erase(tensor.shape.begin() + static_cast<int64_t>(axis));
      return;
    case 3:
      if (rank > 0) tensor.shape[axis] = OtherExtent(random, tensor.shape[axis]);
      return;
    case 4:
    case 5: {  // the same extent everywhere, so that operands still agree; perhaps with another one that becomes zero
      if (rank == 0) return;
      const int64_t before = tensor.shape[axis], now = OtherExtent(random, before);
      const int64_t empty =
          random.OneIn(2) ? tensor.shape[static_cast<size_t>(random.Below(static_cast<int64_t>(rank)))] : -1;
      for (std::vector<Tensor>* tensors : {&out.operands, &out.results}) {
        for (Tensor& other : *tensors) {
          for (int64_t& extent : other.shape) extent = extent == before ? now : extent == empty ? 0 : extent;
        }
      }
      return;
    }
    case 6: {
      Tensor& other = out.operands[static_cast<size_t>(random.Below(static_cast<int64_t>(out.operands.size())))];
      std::swap(tensor, other);
      return;
    }
    case 7:
      if (random.OneIn(2)) {
        list.push_back(Tensor(tensor));
      } else {
        list.pop_back();
      }
      if (out.operands.empty() || out.results.empty()) list.push_back({XLA_FFI_DataType_S32, {1}});
      return;
    default: {
      Attribute& attribute =
          out.attributes[static_cast<size_t>(random.Below(static_cast<int64_t>(out.attributes.size())))];
      if (attribute.kind == XLA_FFI_AttrType_STRING) {
        attribute.text = random.Of<std::string>({"", "int4", "int8", "e2m1", "e4m3", "e8m0", "float", "none", "integer",
                                                 "relu2", "silu", "static_fp8", "swiglu", std::string("int4\0", 5)});
      } else if (attribute.kind == XLA_FFI_AttrType_ARRAY) {
        attribute.floats.assign(static_cast<size_t>(random.Below(5)), 1e38f);
        if (!attribute.places.empty()) {
          const size_t place = static_cast<size_t>(random.Below(static_cast<int64_t>(attribute.places.size())));
          if (random.OneIn(3))
            attribute.places.pop_back();
          else
            attribute.places[place] = random.OneIn(2) ? random.Below(16) - 1 : OtherExtent(random, 3);
        }
      } else if (attribute.type == XLA_FFI_DataType_PRED) {
        attribute.number ^= 1;
      } else {
        const int64_t extent = OtherExtent(random, attribute.number < 0 ? 0 : attribute.number);
        attribute.number = random.OneIn(8) ? -extent : extent;
      }
    }
  }
}

constexpr int64_t kMostBytes = int64_t{1} << 22;  // of one buffer; larger cases are passed over

int64_t ByteWidth(XLA_FFI_DataType type) {
  switch (type) {
    case XLA_FFI_DataType_PRED:
    case XLA_FFI_DataType_U8:
      return 1;
    case XLA_FFI_DataType_BF16:
    case XLA_FFI_DataType_F16:
      return 2;
    case XLA_FFI_DataType_S64:
      return 8;
    default:
      return 4;
  }
}

// Bytes of a buffer of that shape, or -1 where they are more than kMostBytes.
int64_t Bytes(const Tensor& tensor) {
  for (int64_t extent : tensor.shape) {
    if (extent == 0) return 0;
  }
  int64_t bytes = ByteWidth(tensor.type);
  for (int64_t extent : tensor.shape) {
    if (extent > kMostBytes / bytes) return -1;
    bytes *= extent;
  }
  return bytes;
}

// A buffer of exactly its size, so that a sanitizer sees the first byte beyond.
struct Memory {
  Memory(const Tensor& tensor, unsigned char fill) : shape(tensor.shape), bytes(static_cast<size_t>(Bytes(tensor))) {
    data.reset(new unsigned char[bytes]);
    if (bytes > 0) std::memset(data.get(), fill, bytes);
    buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    buffer.extension_start = nullptr;
    buffer.dtype = tensor.type;
    buffer.data = bytes > 0 ? data.get() : nullptr;
    buffer.rank = static_cast<int64_t>(shape.size());
    buffer.dims = shape.data();
  }

  std::vector<int64_t> shape;
  size_t bytes;
  std::unique_ptr<unsigned char[]> data;
  XLA_FFI_Buffer buffer;
};

void Fill(Random& random, Content content, Memory& memory) {
  if (content == Content::kNumbers || content == Content::kWords) {
    const uint64_t tame = content == Content::kNumbers && random.OneIn(2) ? 0x3F3F3F3F3F3F3F3Fu : ~uint64_t{0};
    for (size_t i = 0; i < memory.bytes; i += 8) {
      const uint64_t bits = random.Bits() & tame;
      std::memcpy(memory.data.get() + i, &bits, std::min<size_t>(8, memory.bytes - i));
    }
    return;
  }
  const bool wild = random.OneIn(4);
  for (size_t i = 0; i + 4 <= memory.bytes; i += 4) {
    int64_t value = content == Content::kSlots ? random.Below(300) - 3 : random.Below(12) - 2;
    if (content == Content::kCount) value = random.Of<int64_t>({-1, 0, 1, 8, 65, 1000});
    if (wild && random.OneIn(3)) value = random.Of<int64_t>({INT32_MIN, INT32_MAX, INT32_MAX - 1, 1 << 30, -1});
    const auto word = static_cast<int32_t>(value);
    std::memcpy(memory.data.get() + i, &word, 4);
  }
}

XLA_FFI_Api MakeApi() {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; };
  api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
  api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
    Pool& pool = PoolOf(args->ctx);
    {
      std::lock_guard<std::mutex> lock(pool.mutex);
      pool.tasks.push_back([task = args->task, data = args->data] { task(data); });
    }
    pool.wake.notify_one();
    return nullptr;
  };
  api.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
    *args->num_threads = static_cast<int64_t>(PoolOf(args->ctx).threads.size());
    return nullptr;
  };
  return api;
}

// The handler's error, or "" for success.
std::string Call(const XLA_FFI_Api& api, Pool& pool, const Case& call, std::vector<Memory>& operands,
                 std::vector<Memory>& results) {
  std::vector<void*> arguments, outputs, values;
  for (Memory& memory : operands) arguments.push_back(&memory.buffer);
  for (Memory& memory : results) outputs.push_back(&memory.buffer);
  std::vector<XLA_FFI_ArgType> argument_types(arguments.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> output_types(outputs.size(), XLA_FFI_RetType_BUFFER);
  const size_t count = call.attributes.size();
  std::vector<XLA_FFI_ByteSpan> names(count), texts(count);
  std::vector<XLA_FFI_Scalar> scalars(count);
  std::vector<XLA_FFI_Array> arrays(count);
  std::vector<int64_t> numbers(count);
  std::vector<XLA_FFI_AttrType> kinds;
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  for (size_t i = 0; i < count; ++i) {
    const Attribute& attribute = call.attributes[i];
    names[i] = {attribute.name.data(), attribute.name.size()};
    name_pointers.push_back(&names[i]);
    kinds.push_back(attribute.kind);
    texts[i] = {attribute.text.data(), attribute.text.size()};
    numbers[i] = attribute.number;
    scalars[i] = {attribute.type, &numbers[i]};
    arrays[i] = {attribute.type, attribute.floats.size(), const_cast<float*>(attribute.floats.data())};
    if (!attribute.places.empty()) {
      arrays[i] = {attribute.type, attribute.places.size(), const_cast<int64_t*>(attribute.places.data())};
    }
    values.push_back(attribute.kind == XLA_FFI_AttrType_STRING   ? static_cast<void*>(&texts[i])
                     : attribute.kind == XLA_FFI_AttrType_SCALAR ? static_cast<void*>(&scalars[i])
                                                                 : static_cast<void*>(&arrays[i]));
  }
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = reinterpret_cast<Context>(&pool);
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(arguments.size()), argument_types.data(),
                arguments.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(outputs.size()), output_types.data(),
                outputs.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      static_cast<int64_t>(count), kinds.data(),
                 name_pointers.data(),      values.data()};
  const std::unique_ptr<XLA_FFI_Error> error(HandlerOf(kOps[call.op].name)(&frame));
  return error == nullptr ? "" : error->message;
}

struct Tally {
  std::atomic<int64_t> calls{0}, skipped{0}, unequal{0};
  std::atomic<int64_t> accepted[kOpCount] = {};
};

void RunCase(uint64_t seed, const XLA_FFI_Api& api, Pool& pool, Tally& tally) {
  Random random(seed);
  Case call;
  call.op = static_cast<int>(random.Below(kOpCount));
  kOps[call.op].draw(random, call);
  for (int64_t changes = random.OneIn(3) ? 0 : 1 + random.Below(3); changes > 0; --changes) Change(random, call);
  for (const std::vector<Tensor>* tensors : {&call.operands, &call.results}) {
    for (const Tensor& tensor : *tensors) {
      if (Bytes(tensor) < 0) {
        ++tally.skipped;
        return;
      }
    }
  }
  std::vector<Memory> operands, results, again;
  for (const Tensor& tensor : call.operands) {
    operands.emplace_back(tensor, static_cast<unsigned char>(0));
    Fill(random, tensor.content, operands.back());
  }
  for (const Tensor& tensor : call.results) {
    results.emplace_back(tensor, static_cast<unsigned char>(0xCD));
    again.emplace_back(tensor, static_cast<unsigned char>(0x3A));
  }
  ++tally.calls;
  if (!Call(api, pool, call, operands, results).empty()) return;
  ++tally.accepted[call.op];
  ++tally.calls;
  bool equal = Call(api, pool, call, operands, again).empty();
  for (size_t i = 0; i < results.size(); ++i) {
    equal = equal && std::memcmp(results[i].data.get(), again[i].data.get(), results[i].bytes) == 0;
  }
  if (equal) return;
  ++tally.unequal;
  std::printf("seed %llu: two calls of %s with the same operands differ\n", static_cast<unsigned long long>(seed),
              kOps[call.op].name);
}

int Main(double seconds, int64_t most_calls, int callers, uint64_t first_seed) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  const XLA_FFI_Api api = MakeApi();
  Tally tally;
  {
    Pool pool(2);
    std::atomic<uint64_t> seed{first_seed};
    std::vector<std::thread> threads;
    for (int i = 0; i < callers; ++i) {
      threads.emplace_back([&] {
        while (tally.calls < most_calls && std::chrono::steady_clock::now() < end) {
          RunCase(seed++, api, pool, tally);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  std::printf(
      "%lld calls, %lld results unequal, %lld cases passed over; accepted:", static_cast<long long>(tally.calls),
      static_cast<long long>(tally.unequal), static_cast<long long>(tally.skipped));
  bool vacuous = false;
  for (int op = 0; op < kOpCount; ++op) {
    std::printf(" %s %lld", kOps[op].name, static_cast<long long>(tally.accepted[op]));
    vacuous = vacuous || tally.accepted[op] == 0;
  }
  std::printf("\n");
  return tally.unequal > 0 || vacuous ? 1 : 0;
}

}  // namespace
}  // namespace jax_marlin_moe

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s SECONDS CALLS CALLERS FIRST_SEED\n", argv[0]);
    return 2;
  }
  return jax_marlin_moe::Main(std::atof(argv[1]), std::atoll(argv[2]), std::atoi(argv[3]),
                              std::strtoull(argv[4], nullptr, 10));
}

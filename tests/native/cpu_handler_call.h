// Calls a CPU handler through XLA's C interface: buffers, a thread pool, and the call frame.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu_handler_case.h"
#include "cpu_handler_draws.h"
#include "xla/ffi/api/c_api.h"

// What XLA keeps behind a pointer of its C interface.
struct XLA_FFI_Error {
  std::string message;
};

namespace jax_marlin_moe::fuzz {

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

inline Pool& PoolOf(Context context) { return *reinterpret_cast<Pool*>(context); }

constexpr int64_t kMostBytes = int64_t{1} << 22;  // of one buffer; larger cases are passed over

inline int64_t ByteWidth(XLA_FFI_DataType type) {
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
inline int64_t Bytes(const Tensor& tensor) {
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

inline void Fill(Random& random, Content content, Memory& memory) {
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

inline XLA_FFI_Api MakeApi() {
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
inline std::string Call(const XLA_FFI_Api& api, Pool& pool, const Case& call, std::vector<Memory>& operands,
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

}  // namespace jax_marlin_moe::fuzz

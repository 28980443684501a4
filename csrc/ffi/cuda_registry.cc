#include "ffi/cuda_registry.h"

#include <algorithm>
#include <cstring>
#include <mutex>

namespace jax_marlin_moe::cuda {
namespace {

constexpr size_t kLine = 64;
// Where attributes have a new address at every call, the addresses are forgotten rather than kept without end; so are
// failures, each of which holds a copy of its image.
constexpr size_t kMostSeen = 8192, kMostFailures = 64;

bool EqualBytes(const void* a, const void* b, size_t size) { return size == 0 || std::memcmp(a, b, size) == 0; }

ffi::Error OtherBytes(int64_t fingerprint) {
  return ffi::Error::InvalidArgument(
      "jax_marlin_moe: another program with the fingerprint " + std::to_string(fingerprint) +
      " is known, whose image, contract or kernel names differ from this call's; lower the program again");
}

}  // namespace

Registry::Entry::Entry(const ProgramAttributes& attributes)
    : image(attributes.image.begin(), attributes.image.end()),
      contract(attributes.contract.begin(), attributes.contract.end()),
      kernels(attributes.kernels),
      fingerprint(attributes.fingerprint) {}

bool Registry::Entry::AgreesAtAGlance(const ProgramAttributes& attributes) const {
  const size_t size = image.size(), line = std::min(size, kLine);
  return attributes.fingerprint == fingerprint && attributes.image.size() == size &&
         attributes.contract.size() == contract.size() && attributes.kernels == kernels &&
         EqualBytes(attributes.contract.begin(), contract.data(), contract.size() * sizeof(int64_t)) &&
         EqualBytes(attributes.image.begin(), image.data(), line) &&
         EqualBytes(attributes.image.begin() + (size - line), image.data() + (size - line), line);
}

bool Registry::Entry::Equals(const ProgramAttributes& attributes) const {
  return AgreesAtAGlance(attributes) && EqualBytes(attributes.image.begin(), image.data(), image.size());
}

ffi::ErrorOr<const Program*> Registry::Entry::Outcome() const {
  if (program == nullptr) return ffi::Unexpected(error);
  return program.get();
}

ffi::ErrorOr<const Program*> Registry::FindOrLoad(const Driver& driver, const ProgramAttributes& attributes) {
  Context context = nullptr;
  const Result result = driver.CtxGetCurrent(&context);
  if (result != 0 || context == nullptr) {
    return ffi::Unexpected(ffi::Error::Internal("jax_marlin_moe: no current CUDA context"));
  }
  const Address address{context, attributes.image.begin()};
  {
    std::shared_lock<std::shared_mutex> lock(mutex_);
    const auto seen = seen_.find(address);
    if (seen != seen_.end() && seen->second->AgreesAtAGlance(attributes)) return seen->second->program.get();
  }

  if (!attributes.MatchFingerprint()) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "jax_marlin_moe: the program's machine code, contract and kernel names do not match their fingerprint; lower "
        "it again"));
  }
  const Key key{context, attributes.fingerprint};
  std::unique_lock<std::shared_mutex> lock(mutex_);
  for (const auto* entries : {&programs_, &failures_}) {
    const auto found = entries->find(key);
    if (found == entries->end()) continue;
    if (!found->second->Equals(attributes)) return ffi::Unexpected(OtherBytes(attributes.fingerprint));
    if (entries == &programs_) {
      if (seen_.size() >= kMostSeen) seen_.clear();
      seen_[address] = found->second.get();
    }
    return found->second->Outcome();
  }

  auto loaded = Program::Load(driver, attributes);
  auto entry = std::make_unique<Entry>(attributes);
  if (loaded.has_value()) {
    entry->program = std::move(loaded.value());
    const Entry* kept = programs_.emplace(key, std::move(entry)).first->second.get();
    if (seen_.size() >= kMostSeen) seen_.clear();
    seen_[address] = kept;
    return kept->Outcome();
  }
  entry->error = loaded.error();
  if (loaded.error().errc() == ffi::ErrorCode::kInvalidArgument) {
    if (failures_.size() >= kMostFailures) failures_.clear();
    failures_.emplace(key, std::move(entry));
  }
  return ffi::Unexpected(loaded.error());
}

}  // namespace jax_marlin_moe::cuda

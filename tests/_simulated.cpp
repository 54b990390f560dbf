// An accelerator that is simulated on the CPU, for machines without one: torch's PrivateUse1.
//
// It is as inconvenient as a device may be. The host cannot touch the device's memory. Work that is
// queued on a stream is not done before somebody waits for that stream, so that whoever takes too
// early what a copy brings, or uses again what a copy still reads, always gets the wrong bytes. And
// memory that is freed is overwritten at once, also where real devices would wait for what is queued.

#include <sys/mman.h>
#include <unistd.h>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace {

constexpr auto kSimulated = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;
constexpr size_t kPage = 4096;
constexpr size_t kLarge = 1 << 20;

thread_local c10::DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, kDevices> current_stream{};

// ---- Memory. A device's is mapped twice: without any right, for the tensors' pointers, and with
// all, for the device.

struct Block {
  char* as_the_device_sees_it;
  size_t size;
};

std::mutex memory_lock;
std::map<char*, Block> device_blocks;
std::map<char*, size_t> pinned_blocks;
int64_t pinned_bytes = 0, most_pinned_bytes = 0;
int64_t large_unpinned_copies = 0;

size_t pages(size_t size) { return (std::max<size_t>(size, 1) + kPage - 1) / kPage * kPage; }

// The block that a pointer lies in, or the map's end.
template <typename Blocks>
auto block_of(Blocks& blocks, const void* pointer) {
  auto found = blocks.upper_bound(static_cast<char*>(const_cast<void*>(pointer)));
  return found == blocks.begin() ? blocks.end() : std::prev(found);
}

char* seen_by_the_device(const void* pointer) {
  std::lock_guard guard(memory_lock);
  auto found = block_of(device_blocks, pointer);
  TORCH_CHECK(found != device_blocks.end(), "this is not the device's memory");
  return found->second.as_the_device_sees_it + (static_cast<const char*>(pointer) - found->first);
}

// What was freed stays mapped until the next work is done, which may be on it.
std::vector<std::pair<char*, size_t>> freed;

void let_go(char* memory, size_t size) {
  std::memset(memory, 0xDD, size);
  freed.emplace_back(memory, size);
}

void free_on_device(void* pointer) {
  std::lock_guard guard(memory_lock);
  auto found = device_blocks.find(static_cast<char*>(pointer));
  let_go(found->second.as_the_device_sees_it, found->second.size);
  munmap(found->first, found->second.size);
  device_blocks.erase(found);
}

struct DeviceAllocator final : at::Allocator {
  at::DataPtr allocate(size_t size) override {
    size = pages(size);
    const int file = memfd_create("simulated", 0);
    TORCH_CHECK(file >= 0 && ftruncate(file, size) == 0, "the device is out of memory");
    void* hidden = mmap(nullptr, size, PROT_NONE, MAP_SHARED, file, 0);
    void* seen = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    TORCH_CHECK(hidden != MAP_FAILED && seen != MAP_FAILED, "the device is out of memory");
    std::lock_guard guard(memory_lock);
    device_blocks[static_cast<char*>(hidden)] = {static_cast<char*>(seen), size};
    return {hidden, hidden, &free_on_device, {kSimulated, current_device}};
  }
  at::DeleterFnPtr raw_deleter() const override { return &free_on_device; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(seen_by_the_device(to), seen_by_the_device(from), size);
  }
};
DeviceAllocator device_allocator;
REGISTER_ALLOCATOR(kSimulated, &device_allocator);

void free_pinned(void* pointer) {
  std::lock_guard guard(memory_lock);
  auto found = pinned_blocks.find(static_cast<char*>(pointer));
  let_go(found->first, found->second);
  pinned_bytes -= found->second;
  pinned_blocks.erase(found);
}

struct PinnedAllocator final : at::HostAllocator {
  at::DataPtr allocate(size_t size) override {
    // As torch's own does, for all that are not told otherwise.
    size = std::max<size_t>(kPage, c10::llvm::PowerOf2Ceil(size));
    void* made =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(made != MAP_FAILED, "out of memory");
    std::lock_guard guard(memory_lock);
    pinned_blocks[static_cast<char*>(made)] = size;
    pinned_bytes += size;
    most_pinned_bytes = std::max(most_pinned_bytes, pinned_bytes);
    return {made, made, &free_pinned, c10::DeviceType::CPU};
  }
  at::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
PinnedAllocator pinned_allocator;
REGISTER_HOST_ALLOCATOR(kSimulated, &pinned_allocator);

bool is_pinned(const void* pointer) {
  std::lock_guard guard(memory_lock);
  auto found = block_of(pinned_blocks, pointer);
  return found != pinned_blocks.end() &&
      static_cast<const char*>(pointer) < found->first + found->second;
}

// ---- Streams.

using StreamKey = std::pair<c10::DeviceIndex, c10::StreamId>;
std::mutex streams_lock;
std::map<StreamKey, std::vector<std::function<void()>>> queued;
c10::StreamId newest_stream = 0;

void finish(StreamKey stream) {
  std::lock_guard guard(streams_lock);
  for (auto& work : std::exchange(queued[stream], {})) work();
  const auto is_idle = [](const auto& each) { return each.second.empty(); };
  if (!std::all_of(queued.begin(), queued.end(), is_idle)) return;
  std::lock_guard memory(memory_lock);
  for (auto& [memory_of, size] : std::exchange(freed, {})) munmap(memory_of, size);
}

c10::DeviceIndex index_of(c10::Device device) {
  return device.has_index() ? device.index() : current_device;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSimulated; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return {kSimulated, current_device}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {kSimulated, std::exchange(current_device, index_of(device))};
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(index_of(device) < kDevices, "there are ", int(kDevices), " devices");
    current_device = index_of(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device = index_of(device);
  }
  c10::Stream getStream(c10::Device device) const override {
    const auto index = index_of(device);
    return c10::Stream(c10::Stream::UNSAFE, {kSimulated, index}, current_stream[index]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, {kSimulated, index_of(device)}, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    std::lock_guard guard(streams_lock);
    return c10::Stream(c10::Stream::UNSAFE, {kSimulated, index_of(device)}, ++newest_stream);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = getStream(stream.device());
    current_stream[stream.device_index()] = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override {
    std::lock_guard guard(streams_lock);
    return queued[{stream.device_index(), stream.id()}].empty();
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    finish({stream.device_index(), stream.id()});
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(current_device, device);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto larger = device_allocator.allocate(size);
    device_allocator.copy_data(larger.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(size);
  }
};
Hooks hooks;
[[maybe_unused]] const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// ---- Operators: what makes tensors and copies them. The CPU does all else.

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(
    c10::SymIntArrayRef size,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>,
    std::optional<c10::Device> device,
    std::optional<bool>,
    std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(c10::Device(kSimulated)));
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &device_allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>,
    std::optional<c10::Device> device,
    std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(c10::Device(kSimulated)));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &device_allocator, kKeys,
      c10::dtype_or_default(dtype));
}

const at::Tensor& resize(
    const at::Tensor& tensor, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat>) {
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const size_t needed = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize();
  if (tensor.storage().nbytes() < needed) hooks.resizePrivateUse1Bytes(tensor.storage(), needed);
  return tensor;
}

// Returns a CPU tensor where the device reads and writes. It keeps no memory from being freed.
at::Tensor on_the_device(const at::Tensor& tensor) {
  void* memory = const_cast<void*>(tensor.const_data_ptr());
  auto seen = at::from_blob(
      tensor.is_cpu() ? memory : seen_by_the_device(memory), tensor.sizes(), tensor.strides(),
      tensor.options().device(c10::kCPU).pinned_memory(false));
  seen._set_conj(tensor.is_conj());
  seen._set_neg(tensor.is_neg());
  return seen;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (to.numel() == 0) return to;
  const auto& host = from.is_cpu() ? from : to;
  if (host.is_cpu() && host.nbytes() >= kLarge && !is_pinned(host.const_data_ptr())) {
    std::lock_guard guard(memory_lock);
    ++large_unpinned_copies;
  }
  const auto device = (from.is_cpu() ? to : from).device().index();
  const StreamKey stream{device, current_stream[device]};
  auto source = on_the_device(from), target = on_the_device(to);
  {
    std::lock_guard guard(streams_lock);
    queued[stream].emplace_back([source, target] { target.copy_(source); });
  }
  if (!non_blocking) finish(stream);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& tensor) { return tensor.cpu().item(); }

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("resize_", resize);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
}

// Else these would be resolved by copies, and those again by copies.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

// ---- What torch's Python part and tests ask.

TORCH_LIBRARY(simulated, library) {
  library.def("device_count() -> int", [] { return int64_t(kDevices); });
  library.def("most_pinned_bytes() -> int", [] { return most_pinned_bytes; });
  library.def("large_unpinned_copies() -> int", [] { return large_unpinned_copies; });
  library.def("forget() -> ()", [] {
    most_pinned_bytes = pinned_bytes;
    large_unpinned_copies = 0;
  });
}

}  // namespace

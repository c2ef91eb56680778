// ModelState: the states of running sequences, by slot and as bytes.
#include <algorithm>
#include <cstring>

#include "checks.h"
#include "json_reader.h"
#include "memory.h"
#include "mixer.h"
#include "scratch.h"
#include "ssmcore/error.h"
#include "ssmcore/language_model.h"

namespace ssmcore {
namespace {

const Checks kCheck("model_state", {});

// What a saved state begins with; the number is that of the format.
constexpr char kMagic[] = "ssmcore state 1\n";

std::string describe(const TensorView& tensor) {
  return std::string(dtype_name(tensor.dtype)) + " " + tensor.shape_string();
}

}  // namespace

ModelState::ModelState(const std::vector<std::vector<StateSpec>>& layers, int64_t num_slots,
                       const Context& context, uint64_t model, void* stream)
    : num_slots_(num_slots), context_(&context), model_(model) {
  kCheck.require(num_slots > 0, [&] {
    return "num_slots is " + std::to_string(num_slots) + ", expected at least 1";
  });
  // One slot is placed nowhere first, for the size, then in the memory.
  const auto place = [&](Scratch scratch) {
    tensors_.clear();
    for (const std::vector<StateSpec>& layer : layers) {
      tensors_.emplace_back();
      for (const StateSpec& spec : layer) {
        TensorView tensor =
            scratch.tensor(spec.dtype, {1, spec.shape[0], spec.shape[1]}, context.device());
        tensor.shape[0] = num_slots;
        tensor.strides[0] = static_cast<int64_t>(slot_bytes_ / dtype_size(spec.dtype));
        tensors_.back().push_back(tensor);
      }
    }
    return scratch.used();
  };
  slot_bytes_ = place(Scratch::nowhere());
  buffer_ =
      Buffer(context.allocator(), Scratch::product(slot_bytes_, static_cast<size_t>(num_slots)),
             "the states of a model", stream);
  place(Scratch(buffer_.data()));
  zero_bytes(context, buffer_.data(), buffer_.bytes(), stream);
}

char* ModelState::slot_data(int64_t slot) const {
  return static_cast<char*>(buffer_.data()) + static_cast<size_t>(slot) * slot_bytes_;
}

size_t ModelState::nbytes() const {
  return buffer_.bytes();
}

ModelState ModelState::clone(void* stream) const {
  ModelState copy;
  copy.num_slots_ = num_slots_;
  copy.slot_bytes_ = slot_bytes_;
  copy.context_ = context_;
  copy.model_ = model_;
  copy.buffer_ = Buffer(context_->allocator(), buffer_.bytes(), "the states of a model", stream);
  copy_bytes(*context_, copy.buffer_.data(), buffer_.data(), buffer_.bytes(), stream);
  copy.tensors_ = tensors_;
  for (auto& layer : copy.tensors_)
    for (TensorView& tensor : layer)
      tensor.data = static_cast<char*>(copy.buffer_.data()) +
                    (tensor.as<char>() - static_cast<char*>(buffer_.data()));
  return copy;
}

void ModelState::check_slot(const char* name, int64_t slot) const {
  kCheck.require(slot >= 0 && slot < num_slots_, [&] {
    return std::string(name) + " is " + std::to_string(slot) + ", the state has " +
           std::to_string(num_slots_) + " slots";
  });
}

bool ModelState::is_at_start(int64_t slot, void* stream) const {
  check_slot("slot", slot);
  const char* bytes = slot_data(slot);
  std::string on_host;
  if (context_->device().type == DeviceType::cuda) {
    on_host.resize(slot_bytes_);
    copy_bytes(*context_, on_host.data(), bytes, slot_bytes_, stream);
    bytes = on_host.data();
  }
  return std::all_of(bytes, bytes + slot_bytes_, [](char byte) { return byte == 0; });
}

void ModelState::reset_slot(int64_t slot, void* stream) {
  check_slot("slot", slot);
  zero_bytes(*context_, slot_data(slot), slot_bytes_, stream);
}

void ModelState::copy_slot(int64_t from, int64_t to, void* stream) {
  check_slot("from", from);
  check_slot("to", to);
  if (from != to) copy_bytes(*context_, slot_data(to), slot_data(from), slot_bytes_, stream);
}

// A line of text for every tensor, (slots, ...shape), and an empty line.
std::string ModelState::header() const {
  std::string header = kMagic;
  for (size_t i = 0; i < tensors_.size(); ++i)
    for (const TensorView& tensor : tensors_[i])
      header += "layer " + std::to_string(i) + ": " + describe(tensor) + "\n";
  return header + "\n";
}

std::string ModelState::save(void* stream) const {
  std::string bytes = header();
  const size_t begin = bytes.size();
  bytes.resize(begin + buffer_.bytes());
  copy_bytes(*context_, bytes.data() + begin, buffer_.data(), buffer_.bytes(), stream);
  return bytes;
}

void ModelState::load(const std::string& bytes, void* stream) {
  const std::string expected = header();
  kCheck.require(bytes.compare(0, std::strlen(kMagic), kMagic) == 0, [] {
    return std::string("expected a saved state, which begins with \"ssmcore state 1\"");
  });
  if (bytes.compare(0, expected.size(), expected) != 0) {
    // The lines that differ first.
    size_t begin = std::strlen(kMagic), at = begin;
    while (at < bytes.size() && bytes[at] == expected[at])
      if (expected[at++] == '\n') begin = at;
    const auto line = [begin](const std::string& text) {
      return shown(text.substr(begin, std::min(text.find('\n', begin), begin + 100) - begin));
    };
    kCheck.fail("the saved state is of another model or number of slots: it has " + line(bytes) +
                ", expected " + line(expected));
  }
  const size_t size = expected.size() + buffer_.bytes();
  kCheck.require(bytes.size() == size, [&] {
    return "the saved state has " + std::to_string(bytes.size()) + " bytes, expected " +
           std::to_string(size);
  });
  copy_bytes(*context_, buffer_.data(), bytes.data() + expected.size(), buffer_.bytes(), stream);
}

}  // namespace ssmcore

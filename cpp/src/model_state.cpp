// ModelState: the states of running sequences, by slot and as bytes.
#include <algorithm>
#include <cstring>

#include "checks.h"
#include "json_reader.h"
#include "mixer.h"
#include "scratch.h"
#include "ssmcore/error.h"
#include "ssmcore/language_model.h"

namespace ssmcore {
namespace {

const Checks kCheck("model_state", {});

// What a saved state begins with; the number is that of the format.
constexpr char kMagic[] = "ssmcore state 1\n";

size_t bytes_of(const TensorView& tensor) {
  return static_cast<size_t>(tensor.numel()) * dtype_size(tensor.dtype);
}

std::string describe(const TensorView& tensor) {
  return std::string(dtype_name(tensor.dtype)) + " " + tensor.shape_string();
}

}  // namespace

ModelState::ModelState(const std::vector<std::vector<StateSpec>>& layers, int64_t num_slots,
                       Allocator& allocator, uint64_t model)
    : num_slots_(num_slots), allocator_(&allocator), model_(model) {
  kCheck.require(num_slots > 0, [&] {
    return "num_slots is " + std::to_string(num_slots) + ", expected at least 1";
  });
  // Placed nowhere first, for the size, then in the memory.
  const auto place = [&](Scratch scratch) {
    tensors_.clear();
    for (const std::vector<StateSpec>& layer : layers) {
      tensors_.emplace_back();
      for (const StateSpec& spec : layer)
        tensors_.back().push_back(scratch.tensor(
            spec.dtype, {num_slots, spec.shape[0], spec.shape[1]}, allocator.device()));
    }
    return scratch.used();
  };
  buffer_ = Buffer(allocator, place(Scratch::nowhere()), "the states of a model");
  place(Scratch(buffer_.data()));
  std::memset(buffer_.data(), 0, buffer_.bytes());
}

size_t ModelState::nbytes() const {
  return buffer_.bytes();
}

ModelState ModelState::clone() const {
  ModelState copy;
  copy.num_slots_ = num_slots_;
  copy.allocator_ = allocator_;
  copy.model_ = model_;
  copy.buffer_ = Buffer(*allocator_, buffer_.bytes(), "the states of a model");
  std::memcpy(copy.buffer_.data(), buffer_.data(), buffer_.bytes());
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

bool ModelState::is_at_start(int64_t slot) const {
  check_slot("slot", slot);
  for (const auto& layer : tensors_)
    for (const TensorView& tensor : layer) {
      const TensorView row = tensor.select(0, slot);
      const char* bytes = row.as<const char>();
      if (std::any_of(bytes, bytes + bytes_of(row), [](char byte) { return byte != 0; }))
        return false;
    }
  return true;
}

void ModelState::reset_slot(int64_t slot) {
  check_slot("slot", slot);
  for (const auto& layer : tensors_)
    for (const TensorView& tensor : layer) {
      const TensorView row = tensor.select(0, slot);
      std::memset(row.data, 0, bytes_of(row));
    }
}

void ModelState::copy_slot(int64_t from, int64_t to) {
  check_slot("from", from);
  check_slot("to", to);
  if (from == to) return;
  for (const auto& layer : tensors_)
    for (const TensorView& tensor : layer) {
      const TensorView source = tensor.select(0, from);
      std::memcpy(tensor.select(0, to).data, source.data, bytes_of(source));
    }
}

// A line of text for every tensor, (slots, ...shape), and an empty line.
std::string ModelState::header() const {
  std::string header = kMagic;
  for (size_t i = 0; i < tensors_.size(); ++i)
    for (const TensorView& tensor : tensors_[i])
      header += "layer " + std::to_string(i) + ": " + describe(tensor) + "\n";
  return header + "\n";
}

std::string ModelState::save() const {
  std::string bytes = header();
  bytes.reserve(bytes.size() + buffer_.bytes());
  for (const auto& layer : tensors_)
    for (const TensorView& tensor : layer) bytes.append(tensor.as<const char>(), bytes_of(tensor));
  return bytes;
}

void ModelState::load(const std::string& bytes) {
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
  size_t size = expected.size();
  for (const auto& layer : tensors_)
    for (const TensorView& tensor : layer) size += bytes_of(tensor);
  kCheck.require(bytes.size() == size, [&] {
    return "the saved state has " + std::to_string(bytes.size()) + " bytes, expected " +
           std::to_string(size);
  });
  const char* from = bytes.data() + expected.size();
  for (const auto& layer : tensors_)
    for (const TensorView& tensor : layer) {
      std::memcpy(tensor.data, from, bytes_of(tensor));
      from += bytes_of(tensor);
    }
}

}  // namespace ssmcore

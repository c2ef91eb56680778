#include "safetensors.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "json_reader.h"
#include "mapped_file.h"
#include "ssmcore/checkpoint.h"
#include "ssmcore/error.h"

namespace ssmcore {
namespace {

using nlohmann::json;

constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // as the format's own reader has it

// Builds the views while the header is parsed, so that no document is held in memory and depth and
// repeated names are seen as they come.
class HeaderReader : public nlohmann::json_sax<json> {
 public:
  HeaderReader(const uint8_t* data, size_t data_bytes, const std::string& source)
      : data_(data), data_bytes_(data_bytes), source_(source) {}

  // Checks that the tensors lie end to end, and hands them over.
  std::map<std::string, TensorView> finish();

  bool null() override { return refuse("null"); }
  bool boolean(bool value) override { return refuse(value ? "true" : "false"); }
  bool number_integer(int64_t value) override { return refuse(std::to_string(value)); }
  bool number_unsigned(uint64_t value) override;
  bool number_float(double, const std::string& text) override { return refuse(text.substr(0, 30)); }
  bool string(std::string& value) override;
  bool binary(json::binary_t&) override { return refuse("binary data"); }
  bool start_object(size_t) override;
  bool key(std::string& key) override;
  bool end_object() override;
  bool start_array(size_t) override;
  bool end_array() override;
  bool parse_error(size_t position, const std::string&, const json::exception&) override;

 private:
  enum class Inside { nothing, header, metadata, tensor, list };
  enum class Field { dtype, shape, data_offsets };

  struct Entry {
    std::optional<std::string> dtype;
    std::optional<std::vector<uint64_t>> shape;
    std::optional<std::vector<uint64_t>> data_offsets;
  };

  struct Span {
    uint64_t begin;
    uint64_t end;
    const std::string* name;
  };

  [[noreturn]] void fail(const std::string& reason) const;
  [[noreturn]] void fail_tensor(const std::string& reason) const;
  // A value of the wrong kind.
  [[noreturn]] bool refuse(const std::string& got) const;
  std::optional<std::vector<uint64_t>>& list() {
    return field_ == Field::shape ? entry_.shape : entry_.data_offsets;
  }
  void add_tensor();
  TensorView shaped() const;

  const uint8_t* data_;
  size_t data_bytes_;
  const std::string& source_;
  Inside inside_ = Inside::nothing;
  std::string name_;
  Field field_ = Field::dtype;
  Entry entry_;
  std::map<std::string, TensorView> tensors_;
  std::vector<Span> spans_;
};

void HeaderReader::fail(const std::string& reason) const {
  throw Error(ErrorCode::invalid_checkpoint, source_ + ": " + reason);
}

void HeaderReader::fail_tensor(const std::string& reason) const {
  fail("tensor " + shown(name_) + ": " + reason);
}

bool HeaderReader::refuse(const std::string& got) const {
  switch (inside_) {
    case Inside::nothing:
      fail("expected a JSON object as header, got " + got);
    case Inside::header:
      fail_tensor("expected an object, got " + got);
    case Inside::metadata:
      fail("expected strings in __metadata__, got " + got);
    default:
      break;
  }
  switch (field_) {
    case Field::dtype:
      fail_tensor("expected a string as dtype, got " + got);
    case Field::shape:
      fail_tensor("expected non-negative integers as shape, got " + got);
    default:
      fail_tensor("expected non-negative integers as data_offsets, got " + got);
  }
}

bool HeaderReader::start_object(size_t) {
  if (inside_ == Inside::nothing) {
    inside_ = Inside::header;
  } else if (inside_ == Inside::header) {
    inside_ = name_ == "__metadata__" ? Inside::metadata : Inside::tensor;
    entry_ = {};
  } else {
    refuse("an object");
  }
  return true;
}

bool HeaderReader::key(std::string& key) {
  if (inside_ == Inside::header) {
    name_ = std::move(key);
  } else if (inside_ == Inside::tensor) {
    bool repeated = false;
    if (key == "dtype") {
      field_ = Field::dtype;
      repeated = entry_.dtype.has_value();
    } else if (key == "shape" || key == "data_offsets") {
      field_ = key == "shape" ? Field::shape : Field::data_offsets;
      repeated = list().has_value();
    } else {
      fail_tensor("expected dtype, shape and data_offsets, got " + shown(key));
    }
    if (repeated) fail_tensor(key + " occurs twice");
  }
  return true;
}

bool HeaderReader::end_object() {
  if (inside_ == Inside::tensor) add_tensor();
  inside_ = inside_ == Inside::header ? Inside::nothing : Inside::header;
  return true;
}

bool HeaderReader::start_array(size_t) {
  if (inside_ != Inside::tensor || field_ == Field::dtype) refuse("an array");
  list().emplace();
  inside_ = Inside::list;
  return true;
}

bool HeaderReader::end_array() {
  inside_ = Inside::tensor;
  return true;
}

bool HeaderReader::number_unsigned(uint64_t value) {
  if (inside_ != Inside::list) refuse(std::to_string(value));
  const size_t limit = field_ == Field::shape ? kMaxRank : 2;
  if (list()->size() == limit) {
    fail_tensor("expected at most " + std::to_string(limit) +
                (field_ == Field::shape ? " dimensions" : " data_offsets"));
  }
  list()->push_back(value);
  return true;
}

bool HeaderReader::string(std::string& value) {
  if (inside_ == Inside::tensor && field_ == Field::dtype) {
    entry_.dtype = std::move(value);
  } else if (inside_ != Inside::metadata) {
    refuse(shown(value));
  }
  return true;
}

bool HeaderReader::parse_error(size_t position, const std::string&, const json::exception&) {
  fail("the header is not valid JSON at its byte " + std::to_string(position));
}

void HeaderReader::add_tensor() {
  if (!entry_.dtype) fail_tensor("has no dtype");
  if (!entry_.shape) fail_tensor("has no shape");
  if (!entry_.data_offsets) fail_tensor("has no data_offsets");
  TensorView view = shaped();

  const std::vector<uint64_t>& offsets = *entry_.data_offsets;
  if (offsets.size() != 2) fail_tensor("expected two data_offsets");
  const uint64_t begin = offsets[0], end = offsets[1];
  const std::string range = "[" + std::to_string(begin) + ", " + std::to_string(end) + "]";
  if (begin > end) fail_tensor("data_offsets " + range + " are reversed");
  if (end > data_bytes_) {
    fail_tensor("data_offsets " + range + " reach beyond the file, which has " +
                std::to_string(data_bytes_) + " bytes of data");
  }
  const uint64_t bytes = static_cast<uint64_t>(view.numel()) * dtype_size(view.dtype);
  if (end - begin != bytes) {
    fail_tensor("expected " + std::to_string(bytes) + " bytes for " + dtype_name(view.dtype) +
                " of shape " + view.shape_string() + ", got data_offsets " + range);
  }
  // Views have no read-only form; the header says that these must not be written to.
  view.data = const_cast<uint8_t*>(data_ + begin);

  const auto [place, is_new] = tensors_.emplace(name_, view);
  if (!is_new) fail_tensor("occurs twice");
  spans_.push_back({begin, end, &place->first});
}

// A view of the entry's dtype and shape, without data.
TensorView HeaderReader::shaped() const {
  TensorView view;
  const auto* known = std::find_if(std::begin(kSafetensorsTypes), std::end(kSafetensorsTypes),
                                   [&](const auto& dtype) { return dtype.first == *entry_.dtype; });
  if (known == std::end(kSafetensorsTypes)) {
    std::string names;
    for (const auto& dtype : kSafetensorsTypes)
      names += std::string(names.empty() ? "" : ", ") + dtype.first;
    fail_tensor("dtype " + shown(*entry_.dtype) + " is not supported (supported: " + names + ")");
  }
  view.dtype = known->second;

  // Rank 0 means "absent" in a view, so a scalar gets one dimension.
  const std::vector<uint64_t> shape =
      entry_.shape->empty() ? std::vector<uint64_t>{1} : *entry_.shape;
  view.rank = static_cast<int>(shape.size());
  uint64_t stride = 1;  // times the size so far, empty dimensions counted as 1: never wraps around
  for (int i = view.rank - 1; i >= 0; --i) {
    const uint64_t extent = std::max<uint64_t>(shape[i], 1);
    if (extent > std::numeric_limits<int64_t>::max() / dtype_size(view.dtype) / stride) {
      fail_tensor("shape " + shown(shape) + " is too large");
    }
    view.shape[i] = static_cast<int64_t>(shape[i]);
    view.strides[i] = static_cast<int64_t>(stride);
    stride *= extent;
  }
  return view;
}

std::map<std::string, TensorView> HeaderReader::finish() {
  std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  uint64_t end = 0;
  for (const Span& span : spans_) {
    if (span.begin != end) {
      fail("tensor " + shown(*span.name) + ": " +
           (span.begin < end ? "overlaps the one before it" : "leaves a hole before it") +
           ": expected data from byte " + std::to_string(end) + ", got " +
           std::to_string(span.begin));
    }
    end = span.end;
  }
  if (end != data_bytes_) {
    fail("expected " + std::to_string(end) + " bytes of data, got " + std::to_string(data_bytes_));
  }
  return std::move(tensors_);
}

}  // namespace

std::map<std::string, TensorView> parse_safetensors(const uint8_t* data, size_t size,
                                                    const std::string& source) {
  const auto fail = [&](const std::string& reason) {
    throw Error(ErrorCode::invalid_checkpoint, source + ": " + reason);
  };
  if (size < kLengthBytes) {
    fail("expected a safetensors file, got " + std::to_string(size) + " bytes");
  }
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) header_bytes |= uint64_t{data[i]} << (8 * i);
  if (header_bytes > kMaxHeaderBytes || header_bytes > size - kLengthBytes) {
    fail("header length " + std::to_string(header_bytes) + " does not fit the file, which has " +
         std::to_string(size) + " bytes");
  }
  const uint8_t* header = data + kLengthBytes;
  const uint8_t* header_end = header + header_bytes;
  // The parser skips a byte order mark and takes a zero byte for the end: the format allows
  // neither.
  if (header_bytes == 0 || *header != '{') fail("expected a JSON object as header");
  if (std::memchr(header, 0, header_bytes) != nullptr) fail("the header holds a zero byte");

  HeaderReader reader(header_end, size - kLengthBytes - header_bytes, source);
  json::sax_parse(header, header_end, &reader);
  return reader.finish();
}

TensorMap open_safetensors(const std::string& path) {
  const auto file = std::make_shared<const MappedFile>(path, "open_safetensors");
  return {parse_safetensors(file->data(), file->size(), "open_safetensors: " + path), file, true};
}

}  // namespace ssmcore

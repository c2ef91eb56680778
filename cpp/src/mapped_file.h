// A file mapped into memory for reading.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace ssmcore {

// The whole of a regular file, read-only. Its pages are read when first touched and shared with
// other processes that map it; the file must not be shortened meanwhile.
class MappedFile {
 public:
  // Throws Error(not_found) when `path` is not a regular file that can be read; its message is
  // "<caller>: <path>: <reason>".
  MappedFile(const std::string& path, const std::string& caller);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

  // Lets go of the memory that reading this part of some mapped file took: it is read again when it
  // is touched again.
  static void forget(const void* data, size_t bytes);

 private:
  const uint8_t* data_ = nullptr;  // null for an empty file, which cannot be mapped
  size_t size_ = 0;
};

}  // namespace ssmcore

// A file that has its name only once it is whole.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>

namespace ssmcore {

// Written under another name, which is taken away again unless the file is published. What fails
// throws Error(not_found) that begins with `op` and names the path.
class NewFile {
 public:
  NewFile(const char* op, const std::filesystem::path& path);
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  ~NewFile();

  void write(const void* data, size_t bytes);
  void write(const std::string& text) { write(text.data(), text.size()); }
  // All bytes are on the disk before the name is.
  void flush() const;
  // Over what had the name before.
  void publish();

 private:
  void check(bool succeeded) const;

  const char* op_;
  std::filesystem::path path_;
  std::string temporary_;
  int fd_ = -1;
};

}  // namespace ssmcore

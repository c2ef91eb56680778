#include "new_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "ssmcore/error.h"

namespace ssmcore {

NewFile::NewFile(const char* op, const std::filesystem::path& path) : op_(op), path_(path) {
  static std::atomic<unsigned> count{0};
  temporary_ = path.string() + ".tmp-" + std::to_string(::getpid()) + "-" +
               std::to_string(count.fetch_add(1));
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  check(fd_ >= 0);
}

NewFile::~NewFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

void NewFile::write(const void* data, size_t bytes) {
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(fd_, next, bytes);
    if (written < 0 && errno == EINTR) continue;
    check(written >= 0);
    next += written;
    bytes -= static_cast<size_t>(written);
  }
}

void NewFile::flush() const {
  check(::fsync(fd_) == 0);
}

void NewFile::publish() {
  check(::rename(temporary_.c_str(), path_.c_str()) == 0);
  ::close(fd_);
  fd_ = -1;
}

void NewFile::check(bool succeeded) const {
  if (!succeeded)
    throw Error(ErrorCode::not_found,
                std::string(op_) + ": " + path_.string() + ": " + std::strerror(errno));
}

}  // namespace ssmcore

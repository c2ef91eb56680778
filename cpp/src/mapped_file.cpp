#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "ssmcore/error.h"

namespace ssmcore {
namespace {

struct FileDescriptor {
  int fd;
  ~FileDescriptor() {
    if (fd >= 0) ::close(fd);
  }
};

}  // namespace

MappedFile::MappedFile(const std::string& path, const std::string& caller) {
  const auto fail = [&](const std::string& reason) {
    throw Error(ErrorCode::not_found, caller + ": " + path + ": " + reason);
  };
  // Without O_NONBLOCK, opening a pipe would wait for its writer.
  const FileDescriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  struct stat status;
  if (file.fd < 0 || ::fstat(file.fd, &status) != 0) fail(std::strerror(errno));
  if (S_ISDIR(status.st_mode)) fail(std::strerror(EISDIR));
  if (!S_ISREG(status.st_mode)) fail("Not a regular file");
  if (status.st_size == 0) return;

  const size_t size = static_cast<size_t>(status.st_size);
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (data == MAP_FAILED) fail(std::strerror(errno));
#if defined(MADV_HUGEPAGE)
  // Only advice: what is read from the disk from now on comes in huge pages, where the file system
  // has them. Reading weights from memory is then faster by up to a half.
  ::madvise(data, size, MADV_HUGEPAGE);
#endif
  data_ = static_cast<const uint8_t*>(data);
  size_ = size;
}

void MappedFile::forget(const void* data, size_t bytes) {
  const uintptr_t page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<uint8_t*>(data_), size_);
}

}  // namespace ssmcore

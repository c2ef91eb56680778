// Where a thread keeps what it has begun to load, x and dout of a few channels or steps, until it
// needs it: a ring of kAhead places, filled and taken in turns.
#pragma once

#include "device/async_copy.cuh"
#include "device/words.cuh"

namespace ssmcore::cuda {

// In registers: for pieces of any size, but few of them.
template <typename Piece, int kAhead>
struct RegistersAhead {
  Piece pieces[2][kAhead];

  template <typename T>
  __device__ __forceinline__ void begin(int place, const T* x, const T* dout) {
    pieces[0][place] = *reinterpret_cast<const Piece*>(x);
    pieces[1][place] = *reinterpret_cast<const Piece*>(dout);
  }
  __device__ __forceinline__ void commit() {}
  __device__ __forceinline__ void wait() {}
  __device__ __forceinline__ Piece take(int of, int place) const { return pieces[of][place]; }
};

// In shared memory, for pieces of 8 or 16 bytes of a block of kThreads.
template <typename Piece, int kAhead, int kThreads>
struct SharedAhead {
  using Memory = Piece[kAhead][2][kThreads];
  Memory& memory;

  template <typename T>
  __device__ __forceinline__ void begin(int place, const T* x, const T* dout) {
    copy_async<sizeof(Piece)>(&memory[place][0][threadIdx.x], x);
    copy_async<sizeof(Piece)>(&memory[place][1][threadIdx.x], dout);
  }
  // What is there already.
  __device__ __forceinline__ void put(int of, int place, const Piece& piece) {
    memory[place][of][threadIdx.x] = piece;
  }
  // Ends a place's filling, whether it has been begun or not.
  __device__ __forceinline__ void commit() { commit_copies(); }
  // Until the oldest place is filled.
  __device__ __forceinline__ void wait() { wait_for_copies<kAhead - 1>(); }
  __device__ __forceinline__ Piece take(int of, int place) const {
    return memory[place][of][threadIdx.x];
  }
};

}  // namespace ssmcore::cuda

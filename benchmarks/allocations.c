/* Counts the bytes that torch's allocator for CPUs holds, in all threads: what libc10 gets from posix_memalign.
 *
 *     cc -O2 -shared -fPIC -o allocations.so allocations.c -ldl -lpthread; LD_PRELOAD=./allocations.so python ...
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS (1u << 20) /* of a hash table with linear probing */
static struct { void *at; size_t size; } table[SLOTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t in_use, peak;
static int (*real_posix_memalign)(void **, size_t, size_t);
static void (*real_free)(void *);

static uint32_t slot_of(void *at) { return (uint32_t)(((uintptr_t)at >> 6) * 2654435761u) % SLOTS; }

int64_t allocations_peak(void) { return peak; }
int64_t allocations_in_use(void) { return in_use; }
void allocations_reset_peak(void) { peak = in_use; }

int posix_memalign(void **out, size_t alignment, size_t size) {
  if (!real_posix_memalign) real_posix_memalign = dlsym(RTLD_NEXT, "posix_memalign");
  int code = real_posix_memalign(out, alignment, size);
  if (code || !*out || ((uintptr_t)*out & 63)) return code;
  Dl_info caller;
  if (!dladdr(__builtin_return_address(0), &caller) || !strstr(caller.dli_fname, "libc10.so")) return code;
  pthread_mutex_lock(&lock);
  uint32_t slot = slot_of(*out);
  while (table[slot].at) slot = (slot + 1) % SLOTS;
  table[slot].at = *out;
  table[slot].size = size;
  in_use += (int64_t)size;
  if (in_use > peak) peak = in_use;
  pthread_mutex_unlock(&lock);
  return code;
}

static void forget(void *at) {
  uint32_t slot = slot_of(at);
  while (table[slot].at && table[slot].at != at) slot = (slot + 1) % SLOTS;
  if (!table[slot].at) return;
  in_use -= (int64_t)table[slot].size;
  table[slot].at = NULL;
  /* those that follow move up, so that a search for them does not end at the gap */
  for (uint32_t next = (slot + 1) % SLOTS; table[next].at; next = (next + 1) % SLOTS) {
    uint32_t home = slot_of(table[next].at);
    if (((next - home) % SLOTS) >= ((next - slot) % SLOTS)) {
      table[slot] = table[next];
      table[next].at = NULL;
      slot = next;
    }
  }
}

void free(void *at) {
  if (!real_free) real_free = dlsym(RTLD_NEXT, "free");
  if (at && !((uintptr_t)at & 63)) {
    pthread_mutex_lock(&lock);
    forget(at);
    pthread_mutex_unlock(&lock);
  }
  real_free(at);
}

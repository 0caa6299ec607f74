// Object files that must never be linked as a kernel, and (with no macro) one that may be:
// tests/cache_test.cc hands them to the check of jit/object_check.h.
int system(const char* command);

#ifdef CALLS
#define BODY system("true");
#else
#define BODY
#endif

void kernel(void* const* pointers, long begin, long end) {
  float* out = pointers[0];
  for (long i = begin; i < end; ++i) out[i] = 1;
  BODY
}

#ifdef STARTS
static void Start(void) { __asm__ volatile(""); }
__attribute__((used, section(".init_array"))) static void (*start)(void) = Start;
#endif
#ifdef WRITES
int counter = 1;
#endif
#ifdef TWO
void other(void) {}
#endif

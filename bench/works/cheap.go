package works

/*
#include <stddef.h>
#ifdef __linux__
#include <malloc.h>
#endif

static size_t allocated(void) {
#if defined(__GLIBC__) && (__GLIBC__ > 2 || __GLIBC_MINOR__ >= 33)
	struct mallinfo2 info = mallinfo2();
	return info.uordblks + info.hblkhd;
#else
	return 0;
#endif
}
*/
import "C"

// cHeapKiB is what the program's C has allocated and not freed: SQLite's, nearly all of it. It is known of glibc only, and 0 elsewhere.
func cHeapKiB() int { return int(C.allocated() >> 10) }

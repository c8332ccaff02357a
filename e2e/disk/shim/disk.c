// A disk that a test has in its hand: preloaded into a process (LD_PRELOAD), it stands between the process's C code, such as SQLite, and
// the files in one directory.
//
// DISK_DIR is the directory (absolute, without links). What is done to its files is written to the file DISK_LOG, in the order in which it
// is done, for the disk's content after a loss of power to be made of it. DISK_CONTROL is a file of `struct control`, mapped by the test
// too, by which it makes the disk full, or read-only, while the process runs.
//
// Files whose name ends in -shm are SQLite's shared memory: they may be full and read-only as others, and are not logged.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { FINE, FULL, READ_ONLY, BROKEN };

struct control {
	uint32_t state;  // one of the above, set by the test
	uint32_t lazy;   // 1: fsync and fdatasync say that they have done their work, and have not
	uint64_t sync_microseconds; // how long they take
	uint64_t left;     // set by the test: the process is killed instead of this write or sync, counted down; 0: of none
	uint64_t refusals; // counted here: how often something was refused
};

enum { OPENED = 1, CREATED, WRITTEN, TRUNCATED, SYNCED, UNLINKED, SYNCED_DIR };

// One entry of the log; for SYNCED and SYNCED_DIR, offset is how many entries there were when it began; what follows it is data_size bytes: what was written, or a file's name.
struct entry {
	uint32_t kind, file;
	uint64_t offset, data_size;
};

#define MAX_FDS 4096
#define DIRECTORY UINT32_MAX

struct named { char *path; uint32_t file; };

static struct control *control;
static struct control no_control;
static char directory[PATH_MAX];
static size_t directory_length;
static int log_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t entries;       // how many there are in the log
static uint32_t files;         // the number of the last file
static uint32_t fd_file[MAX_FDS]; // 0: not ours
static uint8_t fd_shm[MAX_FDS];
static struct named names[256];

static int (*real_open)(const char *, int, ...);
static int (*real_close)(int);
static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off64_t);
static int (*real_ftruncate)(int, off64_t);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);
static int (*real_unlink)(const char *);
static int (*real_rename)(const char *, const char *);
static void *(*real_mmap)(void *, size_t, int, int, int, off64_t);

static void die(const char *why) {
	dprintf(2, "disk: %s: %s\n", why, strerror(errno));
	abort();
}

static void *find(const char *name) {
	void *found = dlsym(RTLD_NEXT, name);
	if (!found) die(name);
	return found;
}

__attribute__((constructor)) static void begin(void) {
	real_open = find("open64");
	real_close = find("close");
	real_write = find("write");
	real_pwrite = find("pwrite64");
	real_ftruncate = find("ftruncate64");
	real_fsync = find("fsync");
	real_fdatasync = find("fdatasync");
	real_unlink = find("unlink");
	real_rename = find("rename");
	real_mmap = find("mmap64");
	control = &no_control;
	const char *dir = getenv("DISK_DIR"), *log = getenv("DISK_LOG"), *shared = getenv("DISK_CONTROL");
	if (!dir) return;
	strncpy(directory, dir, sizeof directory - 1);
	directory_length = strlen(directory);
	if (log && (log_fd = real_open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0) die(log);
	if (shared) {
		int fd = real_open(shared, O_RDWR | O_CLOEXEC);
		if (fd < 0) die(shared);
		control = real_mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (control == MAP_FAILED) die(shared);
		real_close(fd);
	}
}

// note writes an entry. The caller has the lock.
static void note(uint32_t kind, uint32_t file, uint64_t offset, const void *data, size_t size) {
	entries++;
	if (log_fd < 0) return;
	struct entry e = {kind, file, offset, size};
	if (real_write(log_fd, &e, sizeof e) != sizeof e) die("failed to write the log");
	for (const char *at = data; size > 0;) {
		ssize_t written = real_write(log_fd, at, size);
		if (written <= 0) die("failed to write the log");
		at += written, size -= written;
	}
}

static int ours(const char *path) {
	return directory_length && !strncmp(path, directory, directory_length) && (path[directory_length] == '/' || !path[directory_length]);
}

static int is_shm(const char *path) {
	size_t length = strlen(path);
	return length > 4 && !strcmp(path + length - 4, "-shm");
}

static struct named *named(const char *path) {
	struct named *free = NULL;
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		if (names[i].path && !strcmp(names[i].path, path)) return &names[i];
		if (!names[i].path && !free) free = &names[i];
	}
	if (!free) die("too many files");
	return free;
}

static uint32_t file_of(int fd) { return fd >= 0 && fd < MAX_FDS ? __atomic_load_n(&fd_file[fd], __ATOMIC_ACQUIRE) : 0; }

// refused says whether the disk does not let anything be changed, with errno set.
static int refused(void) {
	switch (__atomic_load_n(&control->state, __ATOMIC_SEQ_CST)) {
	case READ_ONLY: errno = EROFS; break;
	case BROKEN: errno = EIO; break;
	default: return 0;
	}
	__atomic_add_fetch(&control->refusals, 1, __ATOMIC_SEQ_CST);
	return 1;
}

// live counts down to the moment at which the power fails.
static void live(void) {
	if (__atomic_load_n(&control->left, __ATOMIC_SEQ_CST) && !__atomic_sub_fetch(&control->left, 1, __ATOMIC_SEQ_CST)) {
		kill(getpid(), SIGKILL);
		for (;;) pause();
	}
}

// room gives how many of the bytes find room. On a full disk what is there already may be written over, and nothing may grow.
static size_t room(int fd, size_t size, off64_t offset) {
	if (__atomic_load_n(&control->state, __ATOMIC_SEQ_CST) != FULL) return size;
	struct stat64 found;
	if (fstat64(fd, &found)) die("fstat");
	if (offset + (off64_t)size <= found.st_size) return size;
	__atomic_add_fetch(&control->refusals, 1, __ATOMIC_SEQ_CST);
	return offset < found.st_size ? found.st_size - offset : 0;
}

static int open_file(const char *path, int flags, mode_t mode) {
	if (!ours(path)) return real_open(path, flags, mode);
	pthread_mutex_lock(&lock);
	struct stat64 found;
	int is_new = stat64(path, &found) != 0, fd = -1;
	int full = __atomic_load_n(&control->state, __ATOMIC_SEQ_CST) == FULL;
	if ((flags & O_ACCMODE) != O_RDONLY && refused()) {
	} else if (is_new && (flags & O_CREAT) && full) {
		__atomic_add_fetch(&control->refusals, 1, __ATOMIC_SEQ_CST);
		errno = ENOSPC;
	} else {
		fd = real_open(path, flags, mode);
	}
	if (fd >= MAX_FDS) die("too many files");
	if (fd >= 0) {
		int shm = is_shm(path);
		uint32_t file = DIRECTORY;
		if (is_new || !S_ISDIR(found.st_mode)) {
			struct named *name = named(path);
			if (!name->path || is_new) {
				if (!name->path) name->path = strdup(path);
				name->file = ++files;
				if (!shm) note(is_new ? CREATED : OPENED, name->file, 0, path + directory_length + 1, strlen(path + directory_length + 1));
			}
			file = name->file;
		}
		if (flags & O_TRUNC && !shm) note(TRUNCATED, file, 0, NULL, 0);
		fd_shm[fd] = shm;
		__atomic_store_n(&fd_file[fd], file, __ATOMIC_RELEASE);
	}
	int why = errno;
	pthread_mutex_unlock(&lock);
	errno = why;
	return fd;
}

int open64(const char *path, int flags, ...) {
	va_list rest;
	va_start(rest, flags);
	mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
	va_end(rest);
	return open_file(path, flags, mode);
}

int open(const char *path, int flags, ...) {
	va_list rest;
	va_start(rest, flags);
	mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
	va_end(rest);
	return open_file(path, flags, mode);
}

int close(int fd) {
	if (file_of(fd)) __atomic_store_n(&fd_file[fd], 0, __ATOMIC_RELEASE);
	return real_close(fd);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
	uint32_t file = file_of(fd);
	if (!file) return real_pwrite(fd, data, size, offset);
	if (!fd_shm[fd]) live();
	if (refused()) return -1;
	pthread_mutex_lock(&lock);
	size_t fits = room(fd, size, offset);
	ssize_t written = -1;
	if (fits == 0 && size > 0) {
		errno = ENOSPC;
	} else {
		// First the log: what is in it and was not done may have been lost with the power, as all that was not synced.
		if (!fd_shm[fd]) note(WRITTEN, file, offset, data, fits);
		written = real_pwrite(fd, data, fits, offset);
		if (written >= 0 && (size_t)written != fits) die("the real disk is full");
	}
	int why = errno;
	pthread_mutex_unlock(&lock);
	errno = why;
	return written;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }

ssize_t write(int fd, const void *data, size_t size) {
	if (file_of(fd)) {
		off64_t offset = lseek64(fd, 0, SEEK_CUR);
		ssize_t written = pwrite64(fd, data, size, offset);
		if (written > 0) lseek64(fd, offset + written, SEEK_SET);
		return written;
	}
	return real_write(fd, data, size);
}

int ftruncate64(int fd, off64_t size) {
	uint32_t file = file_of(fd);
	if (!file) return real_ftruncate(fd, size);
	if (refused()) return -1;
	pthread_mutex_lock(&lock);
	if (!fd_shm[fd]) note(TRUNCATED, file, size, NULL, 0);
	int result = real_ftruncate(fd, size), why = errno;
	pthread_mutex_unlock(&lock);
	errno = why;
	return result;
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

// sync_file makes durable what is in the log when it begins. The log stands for the disk: nothing has to reach the real one.
static int sync_file(int fd) {
	uint32_t file = file_of(fd);
	if (!file) return -2;
	if (refused()) return -1;
	int lazy = __atomic_load_n(&control->lazy, __ATOMIC_SEQ_CST);
	pthread_mutex_lock(&lock);
	uint64_t begun = entries;
	pthread_mutex_unlock(&lock);
	live();
	usleep(__atomic_load_n(&control->sync_microseconds, __ATOMIC_SEQ_CST));
	pthread_mutex_lock(&lock);
	if (!fd_shm[fd] && !lazy) note(file == DIRECTORY ? SYNCED_DIR : SYNCED, file, begun, NULL, 0);
	pthread_mutex_unlock(&lock);
	return 0;
}

int fsync(int fd) {
	int result = sync_file(fd);
	return result == -2 ? real_fsync(fd) : result;
}

int fdatasync(int fd) {
	int result = sync_file(fd);
	return result == -2 ? real_fdatasync(fd) : result;
}

int unlink(const char *path) {
	if (!ours(path)) return real_unlink(path);
	if (refused()) return -1;
	pthread_mutex_lock(&lock);
	int result = real_unlink(path), why = errno;
	if (!result) {
		struct named *name = named(path);
		if (!is_shm(path)) note(UNLINKED, 0, 0, path + directory_length + 1, strlen(path + directory_length + 1));
		free(name->path);
		name->path = NULL;
	}
	pthread_mutex_unlock(&lock);
	errno = why;
	return result;
}

// SQLite renames nothing and maps nothing that it writes to but its shared memory. Should it begin to, the tests are to know.
int rename(const char *from, const char *to) {
	if (ours(from) || ours(to)) die("a file is renamed, which this disk cannot do");
	return real_rename(from, to);
}

void *mmap64(void *at, size_t size, int protection, int flags, int fd, off64_t offset) {
	if (file_of(fd) && !fd_shm[fd] && (protection & PROT_WRITE) && (flags & MAP_SHARED)) die("a file is mapped to be written, which this disk cannot do");
	return real_mmap(at, size, protection, flags, fd, offset);
}

void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) { return mmap64(at, size, protection, flags, fd, offset); }

// Package disk gives a program's SQLite database a disk that a test has in its hand: one that forgets, when the power fails, what was not
// synced; that becomes full, or read-only, while the program runs.
//
// It is a small library in C that is preloaded into the program and stands between SQLite and the system. Only C code goes through it:
// what Go's own runtime writes is on the real disk.
package disk

import (
	"context"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

//go:embed shim/disk.c
var source []byte

// State is what a disk is like.
type State uint32

// The states of a disk, as in shim/disk.c.
const (
	// Fine takes everything.
	Fine State = iota
	// Full takes nothing that makes a file larger, and no new file.
	Full
	// ReadOnly takes nothing.
	ReadOnly
	// Broken gives an error for everything that is written.
	Broken
)

// control is what the program's side reads while it runs, as in shim/disk.c.
type control struct {
	state, lazy      uint32
	syncMicroseconds uint64
	left             uint64
	refusals         uint64
}

// Disk is what the files in one directory are on.
type Disk struct {
	// Dir is the directory. All that the program writes there is to be its database.
	Dir string

	library, log, shared string
	mapped               []byte
	// durable is what was in the directory when the log was begun.
	durable map[string][]byte
}

// New makes a disk of the directory, whose files are safe as they are. It builds the library, and keeps what it needs, in another
// directory.
func New(ctx context.Context, dir, workDir string) (*Disk, error) {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	d := &Disk{
		Dir: dir, library: filepath.Join(workDir, "disk.so"), log: filepath.Join(workDir, "disk.log"), shared: filepath.Join(workDir, "disk.control"),
	}
	if err = build(ctx, workDir, d.library); err != nil {
		return nil, err
	}
	if err = os.WriteFile(d.shared, make([]byte, unsafe.Sizeof(control{})), 0o600); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(d.shared, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	d.mapped, err = syscall.Mmap(int(file.Fd()), 0, int(unsafe.Sizeof(control{})), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("failed to map the disk's control: %w", err)
	}
	d.SetSyncTime(syncTime)
	return d, d.Begin()
}

// syncTime is how long the disk takes to sync a file: as long as a good one of those that do not lie. What happens meanwhile is part of
// what a power failure may catch.
const syncTime = 2 * time.Millisecond

func build(ctx context.Context, workDir, library string) error {
	text := filepath.Join(workDir, "disk.c")
	if err := os.WriteFile(text, source, 0o600); err != nil {
		return err
	}
	output, err := exec.CommandContext(ctx, "gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, text, "-ldl").CombinedOutput()
	if err != nil {
		return fmt.Errorf("failed to build the disk: %w\n%s", err, output)
	}
	return nil
}

// Close gives up what the disk holds in this process.
func (d *Disk) Close() error { return syscall.Munmap(d.mapped) }

// Env are the variables with which a program is to be started.
func (d *Disk) Env() []string {
	return []string{"LD_PRELOAD=" + d.library, "DISK_DIR=" + d.Dir, "DISK_LOG=" + d.log, "DISK_CONTROL=" + d.shared}
}

func (d *Disk) control() *control { return (*control)(unsafe.Pointer(&d.mapped[0])) }

// Set changes what the disk is like, from the program's next call on.
func (d *Disk) Set(state State) { atomic.StoreUint32(&d.control().state, uint32(state)) }

// SetLazy makes the disk lie: it says that it has synced what it has not. It shows whether a test notices what is lost then.
func (d *Disk) SetLazy(lazy bool) {
	var value uint32
	if lazy {
		value = 1
	}
	atomic.StoreUint32(&d.control().lazy, value)
}

// SetSyncTime says how long the disk takes to sync a file.
func (d *Disk) SetSyncTime(takes time.Duration) {
	atomic.StoreUint64(&d.control().syncMicroseconds, uint64(takes.Microseconds()))
}

// DieAt has the program killed when it comes to write or sync the nth time from now: it does not get to do it. Zero calls it off.
func (d *Disk) DieAt(n uint64) { atomic.StoreUint64(&d.control().left, n) }

// Refusals counts what the disk has not taken so far.
func (d *Disk) Refusals() uint64 { return atomic.LoadUint64(&d.control().refusals) }

// Begin takes what is in the directory for durable, and begins a new log. No program may be at work.
func (d *Disk) Begin() error {
	d.durable = make(map[string][]byte)
	entries, err := os.ReadDir(d.Dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if !entry.Type().IsRegular() || isShared(entry.Name()) {
			continue
		}
		if d.durable[entry.Name()], err = os.ReadFile(filepath.Join(d.Dir, entry.Name())); err != nil {
			return err
		}
	}
	return os.WriteFile(d.log, nil, 0o600)
}

// isShared says that a file is SQLite's shared memory, which no loss of power leaves anything of.
func isShared(name string) bool { return strings.HasSuffix(name, "-shm") }

// LosePower leaves of what the program has written what a disk may have when the power fails: all that was synced, and of the rest
// whatever chance says, torn at any sector. The program must have been killed before. What is left is durable, and a new log begins.
func (d *Disk) LosePower(seed uint64) (Loss, error) {
	entries, err := readLog(d.log)
	if err != nil {
		return Loss{}, err
	}
	m := newMedium(d.durable)
	for _, e := range entries {
		if err = m.apply(e); err != nil {
			return Loss{}, err
		}
	}
	d.DieAt(0)
	left, loss := m.losePower(seed)
	if err = d.replace(left); err != nil {
		return Loss{}, err
	}
	return loss, d.Begin()
}

// replace puts these files in the place of what the program had there. A file that is not the program's stays as it is.
func (d *Disk) replace(left map[string][]byte) error {
	entries, err := os.ReadDir(d.Dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if _, stays := left[entry.Name()]; !stays && entry.Type().IsRegular() {
			if err = os.Remove(filepath.Join(d.Dir, entry.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	for name, content := range left {
		if err = os.WriteFile(filepath.Join(d.Dir, name), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// The log's entries, as in shim/disk.c.
const (
	opened = iota + 1
	created
	written
	truncated
	synced
	unlinked
	syncedDir
)

type entry struct {
	kind, file uint32
	offset     uint64
	data       []byte
}

const entryHeader = 24

// readLog reads the log. Its last entry may be cut off where the program was killed.
func readLog(path string) (entries []entry, err error) {
	log, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for len(log) >= entryHeader {
		e := entry{
			kind: binary.NativeEndian.Uint32(log), file: binary.NativeEndian.Uint32(log[4:]), offset: binary.NativeEndian.Uint64(log[8:]),
		}
		size := binary.NativeEndian.Uint64(log[16:])
		log = log[entryHeader:]
		if size > uint64(len(log)) {
			break
		}
		e.data, log = log[:size:size], log[size:]
		entries = append(entries, e)
	}
	return entries, nil
}

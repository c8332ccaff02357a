package cryptohook

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// stallWatch measures how long operations take, less the time in which the process itself did not get to run: on a machine that is busy
// with something else, everybody is slow.
type stallWatch struct {
	producing atomic.Bool

	mu sync.Mutex
	// lost is for how long the process did not get to run, in all: see run.
	lost time.Duration
	// longest are the operations that took longest, of each name, and counts how many there were.
	longest map[string]stall
	counts  map[string]int
	running map[*stall]struct{}
}

// stall is one operation.
type stall struct {
	name  string
	begun time.Time
	// took is how long it took, lost how much of that was not the operation's fault.
	took, lost time.Duration
}

func (s stall) own() time.Duration { return s.took - s.lost }

// heartbeat is how often a goroutine that does nothing else wants to run.
const heartbeat = 20 * time.Millisecond

func newStallWatch() *stallWatch {
	w := &stallWatch{longest: make(map[string]stall), counts: make(map[string]int), running: make(map[*stall]struct{})}
	w.producing.Store(true)
	return w
}

// run is the heartbeat.
func (w *stallWatch) run(ctx context.Context) {
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	waited := make(map[string]time.Duration)
	waitForCPU(waited)
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := time.Now()
		late := max(now.Sub(last)-2*heartbeat, waitForCPU(waited)/time.Duration(runtime.GOMAXPROCS(0)))
		w.mu.Lock()
		w.lost += max(late, 0)
		w.mu.Unlock()
		last = now
	}
}

// waitForCPU gives how long the threads of this process could have run since the last time, and other processes did. Linux only.
func waitForCPU(before map[string]time.Duration) (since time.Duration) {
	threads, _ := filepath.Glob("/proc/self/task/*/schedstat")
	for _, thread := range threads {
		var ran, waited time.Duration
		if text, err := os.ReadFile(thread); err != nil {
			continue
		} else if _, err = fmt.Sscan(string(text), (*int64)(&ran), (*int64)(&waited)); err != nil {
			continue
		}
		since += max(waited-before[thread], 0)
		before[thread] = waited
	}
	return since
}

func (w *stallWatch) do(name string, operation func() error) error {
	s := &stall{name: name, begun: time.Now()}
	w.mu.Lock()
	lost := w.lost
	w.running[s] = struct{}{}
	w.mu.Unlock()
	err := operation()
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.running, s)
	s.took, s.lost = time.Since(s.begun), w.lost-lost
	w.counts[name]++
	if s.own() > w.longest[name].own() {
		w.longest[name] = *s
	}
	return err
}

// stalls tells which operations took too long.
func (w *stallWatch) stalls() (told []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, s := range w.longest {
		if s.own() > longestStall() {
			told = append(told, fmt.Sprintf("%s took %v, of which the process was not running for %v", name, s.took, s.lost))
		}
	}
	return told
}

// String tells the longest operation of each name, and what is under way.
func (w *stallWatch) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var lines []string
	for name, s := range w.longest {
		lines = append(lines, fmt.Sprintf("%s: %d times, at most %v (lost %v)", name, w.counts[name], s.took.Round(time.Millisecond), s.lost.Round(time.Millisecond)))
	}
	slices.Sort(lines)
	for s := range w.running {
		lines = append(lines, fmt.Sprintf("under way: %s since %v", s.name, time.Since(s.begun).Round(time.Millisecond)))
	}
	return fmt.Sprintf("the process did not get to run for %v in all\n%s", w.lost.Round(time.Millisecond), strings.Join(lines, "\n"))
}

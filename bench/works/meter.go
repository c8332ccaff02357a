package works

import (
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"sendertrust/bench/figures"
)

// meter measures what happens between begin and end, however often.
type meter struct {
	wall, cpu           time.Duration
	wallBegan, cpuBegan time.Duration
	epoch               time.Time
}

// newMeter forgets what was before: garbage, and the peak of the memory.
func newMeter() meter {
	debug.FreeOSMemory()
	// Linux sets the peak back to what is resident now. Elsewhere the peak is that of the whole process.
	_ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0)
	return meter{epoch: time.Now()}
}

func (m *meter) begin() { m.wallBegan, m.cpuBegan = time.Since(m.epoch), cpuTime() }

func (m *meter) end() {
	m.wall += time.Since(m.epoch) - m.wallBegan
	m.cpu += cpuTime() - m.cpuBegan
}

// figure gives how long each of so many took.
func (m *meter) figure(work string, count int) figures.Figure {
	return figures.Figure{
		Work: work, Count: count, PeakKiB: statusKiB("VmHWM:"),
		MicrosEach: each(m.wall, count), CPUMicrosEach: each(m.cpu, count),
	}
}

func each(took time.Duration, count int) float64 {
	return float64(took.Nanoseconds()) / 1000 / float64(count)
}

func cpuTime() time.Duration {
	var usage syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// statusKiB reads a line of what Linux says of this process; 0 elsewhere.
func statusKiB(name string) int {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == name {
			value, _ := strconv.Atoi(fields[1])
			return value
		}
	}
	return 0
}

// residentKiB is what is resident once all garbage is given back.
func residentKiB() int {
	debug.FreeOSMemory()
	return statusKiB("VmRSS:")
}

// goHeapKiB is what the program's Go can still reach.
func goHeapKiB() int {
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int(stats.HeapAlloc >> 10)
}

//go:build faultpoints

package faultpoint

import (
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// Variable names the point at which the program is to die, and the how-manieth time: "flush/begun:3".
const Variable = "FAULTPOINT"

// linger is how long whatever else is under way in the process still has when the point is reached. What comes of it in that time is
// part of what a crash may leave behind.
const linger = 50 * time.Millisecond

var (
	armed, left = arm(os.Getenv(Variable))
	reached     atomic.Int64
)

func arm(plan string) (point string, times int64) {
	name, count, _ := strings.Cut(plan, ":")
	times, err := strconv.ParseInt(count, 10, 64)
	if err != nil {
		times = 1
	}
	return name, times
}

// Reach kills the process if this is the point and the time at which it is to die.
func Reach(point string) {
	if point != armed || reached.Add(1) != left {
		return
	}
	time.Sleep(linger)
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

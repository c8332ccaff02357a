package child

import (
	"bytes"
	"errors"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

func start(t *testing.T, script string) *Process {
	t.Helper()
	process, err := Start(exec.Command("sh", "-c", script), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = process.Stop(0) })
	return process
}

func groupIsGone(process *Process) bool {
	return errors.Is(syscall.Kill(-process.PID(), 0), syscall.ESRCH)
}

func TestProgramThatIgnoresSignalsIsKilled(t *testing.T) {
	// What it writes says that the signal is ignored from now on. It then reads for ever, as only we have the other end.
	process := start(t, `trap "" TERM; read line; echo "$line"; read line`)
	if _, err := process.Stdin.Write([]byte("go on\n")); err != nil {
		t.Fatal(err)
	}
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for process.Tail() == "" {
		select {
		case <-ticker.C:
		case <-process.Exited():
			t.Fatal("it has ended by itself")
		}
	}
	if err := process.Stop(50 * time.Millisecond); err == nil || !strings.Contains(err.Error(), "was killed") {
		t.Errorf("stopping it says: %v", err)
	}
	if !groupIsGone(process) {
		t.Error("something of it is still there")
	}
	if err := process.Stop(time.Minute); err != nil {
		t.Errorf("stopping it again: %v", err)
	}
}

func TestProgramEndsWhenItsInputIsClosed(t *testing.T) {
	process := start(t, `cat; echo bye; exit 3`)
	if err := process.Hangup(time.Minute); err != nil {
		t.Fatal(err)
	}
	if exit := new(exec.ExitError); !errors.As(process.Err(), &exit) || exit.ExitCode() != 3 {
		t.Errorf("it ended with: %v", process.Err())
	}
	if process.Tail() != "bye" {
		t.Errorf("it wrote %q", process.Tail())
	}
	if err := process.Hangup(time.Minute); err != nil {
		t.Errorf("closing it again: %v", err)
	}
}

func TestTailKeepsTheEnd(t *testing.T) {
	var log tail
	for range 3 {
		if n, err := log.Write(bytes.Repeat([]byte("x"), tailLimit)); n != tailLimit || err != nil {
			t.Fatal(n, err)
		}
	}
	if _, err := log.Write([]byte("end\n")); err != nil {
		t.Fatal(err)
	}
	if kept := log.String(); !strings.HasSuffix(kept, "xend") || len(log.kept) != tailLimit {
		t.Errorf("kept %d bytes, ending in %q", len(log.kept), kept[len(kept)-8:])
	}
}

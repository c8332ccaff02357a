// Package child installs and runs the programs of the end-to-end tests that are not written in Go: the homeserver and Element's
// crypto.
//
// Each such program ends when its standard input is closed. The system closes it when we end, however that comes about, so that
// no program is left behind.
package child

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// installPatience is how long a setup that was told to end may take to do so.
	installPatience = 5 * time.Second
	// outputPatience is how long we wait for the last output of a program that has ended.
	outputPatience = 5 * time.Second
	// tailLimit is how much of its output is kept of each program, in bytes.
	tailLimit = 8 << 10
)

// Install installs one part of what e2e/setup.sh installs, if it is not there yet, and gives its directory. What the script says
// goes to standard error.
func Install(ctx context.Context, projectRoot, part string) (dir string, err error) {
	script, err := filepath.Abs(filepath.Join(projectRoot, "e2e", "setup.sh"))
	if err != nil {
		return "", fmt.Errorf("failed to find the setup: %w", err)
	}
	cmd := exec.CommandContext(ctx, script, part)
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = installPatience
	output, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("failed to install %s: %w", part, err)
	}
	return strings.TrimSpace(string(output)), nil
}

// Process is a program that runs until it ends by itself, until [Process.Stop], or until its standard input is closed.
type Process struct {
	// Stdin is the program's standard input.
	Stdin io.WriteCloser

	cmd    *exec.Cmd
	log    tail
	exited chan struct{}
	err    error
}

// Start starts a program in a process group of its own, so that Ctrl-C in a terminal reaches only us, who stop it in order.
// What it writes to standard error goes to the log, which may be nil, and the end of that is kept for [Process.Tail]; so does
// what it writes to standard output, unless the command says otherwise.
func Start(cmd *exec.Cmd, log io.Writer) (*Process, error) {
	process := &Process{cmd: cmd, exited: make(chan struct{})}
	var err error
	if process.Stdin, err = cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("failed to make a pipe: %w", err)
	}
	if log == nil {
		log = io.Discard
	}
	cmd.Stderr = io.MultiWriter(&process.log, log)
	if cmd.Stdout == nil {
		cmd.Stdout = cmd.Stderr
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.WaitDelay = outputPatience
	if err = cmd.Start(); err != nil {
		return nil, fmt.Errorf("failed to start %s: %w", process, err)
	}
	go func() {
		process.err = cmd.Wait()
		close(process.exited)
	}()
	return process, nil
}

// String is the program's name.
func (p *Process) String() string { return filepath.Base(p.cmd.Path) }

// PID is the program's process ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Exited is closed when the program has ended.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Err waits until the program has ended, and says how: nil when it did so with exit code 0.
func (p *Process) Err() error {
	<-p.exited
	return p.err
}

// Tail gives the last lines that the program wrote.
func (p *Process) Tail() string { return p.log.String() }

// Stop asks the program to end by SIGTERM. One that does not within the patience is killed, with all of its process group. It
// returns when the program is gone, with an error if it had to be killed.
func (p *Process) Stop(patience time.Duration) error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("failed to signal %s: %w", p, err)
	}
	return p.awaitEnd(patience)
}

// Hangup asks the program to end by closing its standard input, and otherwise does what [Process.Stop] does.
func (p *Process) Hangup(patience time.Duration) error {
	if err := p.Stdin.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("failed to close the input of %s: %w", p, err)
	}
	return p.awaitEnd(patience)
}

func (p *Process) awaitEnd(patience time.Duration) error {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-p.exited:
		return nil
	case <-timer.C:
	}
	if err := syscall.Kill(-p.PID(), syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("failed to kill %s: %w", p, err)
	}
	<-p.exited
	return fmt.Errorf("%s did not end within %s, and was killed", p, patience)
}

// tail keeps the end of what is written to it.
type tail struct {
	lock sync.Mutex
	kept []byte
}

func (t *tail) Write(written []byte) (int, error) {
	t.lock.Lock()
	defer t.lock.Unlock()
	t.kept = append(t.kept, written...)
	if excess := len(t.kept) - tailLimit; excess > 0 {
		t.kept = append(t.kept[:0], t.kept[excess:]...)
	}
	return len(written), nil
}

func (t *tail) String() string {
	t.lock.Lock()
	defer t.lock.Unlock()
	return strings.TrimSpace(string(t.kept))
}

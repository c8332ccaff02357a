package main

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"sendertrust/e2e/child"
)

// The size of the client's window, and of the pictures, in pixels. The screen is as high as the highest picture.
const (
	width        = 900
	usualHeight  = 700
	screenHeight = 1060
)

const (
	launchPatience = 30 * time.Second
	stopPatience   = 5 * time.Second
)

//go:embed openbox.xml
var openboxConfig []byte

//go:embed fonts.xml
var fontsConfig []byte

//go:embed elements.py
var elementsScript string

// desktop is a screen that nobody sees, with what a desktop program expects to find on one: a window manager, a message bus and
// through that the interface for screen readers, by which we know what is shown where.
type desktop struct {
	// home is the home directory of everything that runs there.
	home string
	env  []string
	// running are the programs, in the order of their start.
	running []*child.Process
	// window is the client's window, height its height in pixels.
	window string
	height int
	// room is the name of the room that the client shows.
	room string
}

// startDesktop starts a desktop whose programs keep their files in the directory.
func startDesktop(ctx context.Context, home string) (*desktop, error) {
	d := &desktop{home: home, env: []string{
		// Nothing of the environment that we run in, so that the pictures are the same everywhere.
		"PATH=" + os.Getenv("PATH"), "HOME=" + home, "XDG_RUNTIME_DIR=" + filepath.Join(home, "run"), "LANG=C.UTF-8", "TZ=UTC",
		"FONTCONFIG_FILE=" + filepath.Join(home, "fonts.xml"), "QT_LINUX_ACCESSIBILITY_ALWAYS_ON=1", "QT_QUICK_BACKEND=software",
	}}
	ctx, cancel := context.WithTimeoutCause(ctx, launchPatience, errors.New("it took too long"))
	defer cancel()
	if err := d.start(ctx); err != nil {
		return nil, errors.Join(err, d.stop())
	}
	return d, nil
}

func (d *desktop) start(ctx context.Context) error {
	if err := os.Mkdir(filepath.Join(d.home, "run"), 0o700); err != nil {
		return err
	}
	for name, content := range map[string][]byte{"openbox.xml": openboxConfig, "fonts.xml": fontsConfig} {
		if err := os.WriteFile(filepath.Join(d.home, name), content, 0o600); err != nil {
			return err
		}
	}
	screen := fmt.Sprintf("%dx%dx24", width, screenHeight)
	display, err := d.launchTelling(ctx, "Xvfb", "-displayfd", "3", "-screen", "0", screen, "-nolisten", "tcp", "-noreset")
	if err != nil {
		return err
	}
	d.env = append(d.env, "DISPLAY=:"+display)
	bus, err := d.launchTelling(ctx, "dbus-daemon", "--session", "--nofork", "--nopidfile",
		"--address=unix:dir="+filepath.Join(d.home, "run"), "--print-address=3")
	if err != nil {
		return err
	}
	d.env = append(d.env, "DBUS_SESSION_BUS_ADDRESS="+bus)
	_, err = d.launch(exec.Command("openbox", "--config-file", filepath.Join(d.home, "openbox.xml"), "--sm-disable"))
	return err
}

// launch starts a program on the desktop, which ends with the desktop.
func (d *desktop) launch(cmd *exec.Cmd) (*child.Process, error) {
	cmd.Env, cmd.Dir = d.env, d.home
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	process, err := child.Start(cmd, nil)
	if err != nil {
		return nil, err
	}
	d.running = append(d.running, process)
	return process, nil
}

// launchTelling starts a program that writes one line to its file descriptor 3 when it is ready, and gives that line.
func (d *desktop) launchTelling(ctx context.Context, name string, arguments ...string) (line string, err error) {
	read, write, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer read.Close()
	cmd := exec.Command(name, arguments...)
	cmd.ExtraFiles = []*os.File{write}
	process, err := d.launch(cmd)
	write.Close()
	if err != nil {
		return "", err
	}
	defer context.AfterFunc(ctx, func() { read.Close() })()
	line, err = bufio.NewReader(read).ReadString('\n')
	switch {
	case ctx.Err() != nil:
		return "", fmt.Errorf("%s did not start: %w", name, context.Cause(ctx))
	case errors.Is(err, io.EOF):
		return "", fmt.Errorf("%s did not start: %s", name, process.Tail())
	case err != nil:
		return "", err
	}
	return strings.TrimSpace(line), nil
}

// run runs a program on the desktop, which ends by itself, and gives its output.
func (d *desktop) run(ctx context.Context, name string, arguments ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, arguments...)
	cmd.Env, cmd.Dir = d.env, d.home
	output, err := cmd.Output()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.As(err, &exit):
		return nil, fmt.Errorf("%s failed: %w\n%s", name, err, exit.Stderr)
	}
	return output, err
}

// check says whether one of the programs has ended, which none should.
func (d *desktop) check() error {
	for _, process := range d.running {
		select {
		case <-process.Exited():
			return fmt.Errorf("%s has ended: %w\n%s", process, process.Err(), process.Tail())
		default:
		}
	}
	return nil
}

// tail gives the last words of the program that was started last.
func (d *desktop) tail() string { return d.running[len(d.running)-1].Tail() }

// stop ends the programs, the last first.
func (d *desktop) stop() (err error) {
	for len(d.running) > 0 {
		last := len(d.running) - 1
		err = errors.Join(err, d.running[last].Stop(stopPatience))
		d.running = d.running[:last]
	}
	return err
}

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// tests is how the package is tested.
type tests struct {
	pkg, run, then, skip, tags string
	timeout                    time.Duration
	// folder holds the programs; all is that of all mutants.
	folder, all string
	// failed are the tests that some mutant made fail, with the one that did so most precisely.
	failed map[string]failure
}

// failure is how a mutant made a test fail: among how many others.
type failure struct {
	mutant string
	others int
}

// note notes which tests a mutant has made fail.
func (t *tests) note(m mutant, out []byte) {
	var names []string
	for _, match := range failLine.FindAllSubmatch(out, -1) {
		if name := string(match[1]); strings.Contains(name, "/") {
			names = append(names, name)
		}
	}
	// Who comes after a panic has not run, and might have failed, too.
	panicked := bytes.Contains(out, []byte("\npanic: "))
	for _, name := range names {
		if before, seen := t.failed[name]; !seen || before.others > len(names)-1 && !panicked {
			t.failed[name] = failure{m.String(), len(names) - 1}
		}
	}
}

var (
	ranLine  = regexp.MustCompile(`(?m)^=== RUN +(\S+/\S+)$`)
	failLine = regexp.MustCompile(`(?m)^ *--- FAIL: (\S+)`)
)

// rowsOf gives the sub-tests that have run.
func rowsOf(out []byte) (rows []string) {
	for _, match := range ranLine.FindAllSubmatch(out, -1) {
		rows = append(rows, string(match[1]))
	}
	return rows
}

type outcome int

const (
	outcomeKilled outcome = iota
	outcomeSurvived
	outcomeInvalid
)

// prepare compiles the tests with all mutants, sees that they pass while none is chosen, and gives the sub-tests of the first selection.
func (t *tests) prepare(mutants []mutant) (rows []string, err error) {
	perFile := make(map[string]map[int]mutant)
	for i, m := range mutants {
		if perFile[m.file] == nil {
			perFile[m.file] = make(map[int]mutant)
		}
		if m.kind != apart {
			perFile[m.file][i+1] = m
		}
	}
	replaced := make(map[string]string)
	for path, ofFile := range perFile {
		if replaced[path], err = withAll(path, ofFile); err != nil {
			return nil, err
		}
		if replaced[filepath.Join(t.pkg, "zz_mutants.go")] == "" {
			name, err := packageName(path)
			if err != nil {
				return nil, err
			}
			replaced[filepath.Join(t.pkg, "zz_mutants.go")] = chooser(name)
		}
	}
	t.all = filepath.Join(t.folder, "all.test")
	if out, err := t.build(t.all, replaced); err != nil {
		return nil, fmt.Errorf("the tests do not compile with all mutants in: %w\n%s", err, out)
	}
	for i, selected := range t.selections() {
		out, err := t.test(t.all, selected, 0)
		if err != nil {
			return nil, fmt.Errorf("the tests fail without any mutant: %w\n%s", err, out[max(0, len(out)-2000):])
		}
		if i == 0 {
			rows = rowsOf(out)
		}
	}
	return rows, nil
}

func (t *tests) selections() []string {
	if t.then == "" {
		return []string{t.run}
	}
	return []string{t.run, t.then}
}

// try says what the tests make of a mutant; numbers begin at 0.
func (t *tests) try(number int, m mutant) (outcome, error) {
	binary := t.all
	if m.kind == apart {
		source, err := os.ReadFile(m.file)
		if err != nil {
			return 0, err
		}
		binary = filepath.Join(t.folder, "apart.test")
		if _, err = t.build(binary, map[string]string{m.file: string(source[:m.start]) + m.with + string(source[m.end:])}); err != nil {
			return outcomeInvalid, nil
		}
	}
	for _, selected := range t.selections() {
		out, err := t.test(binary, selected, number+1)
		if err == nil {
			continue
		}
		t.note(m, out)
		return outcomeKilled, nil
	}
	return outcomeSurvived, nil
}

// build compiles the package's tests with other texts in the places of its files.
func (t *tests) build(binary string, replaced map[string]string) ([]byte, error) {
	overlay := make(map[string]string)
	for path, text := range replaced {
		absolute, err := filepath.Abs(path)
		if err != nil {
			return nil, err
		}
		stand := filepath.Join(t.folder, "instead-"+filepath.Base(path))
		if err = os.WriteFile(stand, []byte(text), 0o600); err != nil {
			return nil, err
		}
		overlay[absolute] = stand
	}
	list, err := json.Marshal(map[string]any{"Replace": overlay})
	if err != nil {
		return nil, err
	}
	path := filepath.Join(t.folder, "overlay.json")
	if err = os.WriteFile(path, list, 0o600); err != nil {
		return nil, err
	}
	// vet is not asked: it complains of what a mutant leaves unused or doubtful.
	return exec.Command("go", "test", "-c", "-vet", "off", "-tags", t.tags, "-o", binary, "-overlay", path, t.pkg).CombinedOutput()
}

// test runs the selected tests in the package's folder, as go test does.
func (t *tests) test(binary, selected string, chosen int) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), t.timeout+10*time.Second)
	defer cancel()
	command := exec.CommandContext(ctx, binary,
		"-test.v", "-test.short", "-test.timeout", t.timeout.String(), "-test.run", selected, "-test.skip", t.skip)
	command.Dir = t.pkg
	command.Env = append(os.Environ(), chosenVariable+"="+strconv.Itoa(chosen))
	// A mutant may loop for ever, and its tests may have started processes of their own.
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGKILL) }
	command.WaitDelay = 5 * time.Second
	out, err := command.CombinedOutput()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) && ctx.Err() == nil {
		return nil, err
	}
	return out, err
}

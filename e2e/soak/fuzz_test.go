package soak

import (
	"bytes"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// fuzzTime is how long each target is fuzzed, by one worker; fuzzedAtOnce is how many are.
const (
	fuzzTime     = 60 * time.Second
	fuzzedAtOnce = 2
)

var executions = regexp.MustCompile(`execs: (\d+)`)

// Every fuzz target of the project gets inputs that nobody has thought of, beyond the seeds that its package's own tests play.
func TestFuzzTargets(t *testing.T) {
	if !*full {
		t.Skip("only with -full: make test plays the seeds")
	}
	w := theWorld(t)
	found := 0
	atOnce := make(chan struct{}, fuzzedAtOnce)
	for _, packagePath := range []string{"./cryptohook", "./bot"} {
		for _, target := range fuzzTargets(t, w.root, packagePath) {
			found++
			t.Run(target, func(t *testing.T) {
				t.Parallel()
				atOnce <- struct{}{}
				defer func() { <-atOnce }()
				r := result{part: "fuzz", what: target, note: "tries are inputs"}
				cmd := goTest(t, w.root, "-run", "^$", "-fuzz", "^"+target+"$", "-fuzztime", fuzzTime.String(), "-fuzzminimizetime", "20x", "-parallel", "1", packagePath)
				output, err := cmd.CombinedOutput()
				if runs := executions.FindAllSubmatch(output, -1); len(runs) > 0 {
					r.tries = must(strconv.Atoi(string(runs[len(runs)-1][1])))(t)
				}
				if r.held = r.tries; err != nil {
					r.wrong++
					t.Logf("%v\n%s", err, lastLines(output, 60))
				}
				check(t, r)
			})
		}
	}
	if found == 0 {
		t.Error("there are no fuzz targets")
	}
}

func fuzzTargets(t *testing.T, root, packagePath string) (targets []string) {
	output := must(goTest(t, root, "-list", "^Fuzz", packagePath).Output())(t)
	for line := range strings.Lines(string(output)) {
		if strings.HasPrefix(line, "Fuzz") {
			targets = append(targets, strings.TrimSpace(line))
		}
	}
	return targets
}

func goTest(t *testing.T, root string, arguments ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"test", "-tags", "goolm"}, arguments...)...)
	cmd.Dir = root
	return cmd
}

func lastLines(output []byte, count int) string {
	lines := bytes.Split(bytes.TrimSpace(output), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-count):], []byte("\n")))
}

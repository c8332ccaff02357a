package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/rs/zerolog"
	"go.mau.fi/zeroconfig"

	"sendertrust/bot"
)

// The test binary is this program, with less in it, when the variable is set: see TestSecondSignalEndsTheProgramAtOnce.
const waitForSignals = "WAIT_FOR_SIGNALS"

func TestMain(m *testing.M) {
	if os.Getenv(waitForSignals) == "" {
		os.Exit(m.Run())
	}
	ctx := untilSignal()
	fmt.Println("started")
	<-ctx.Done()
	fmt.Println("stopping")
	select {} // a stop that never comes to its end
}

// program runs it with these arguments.
func program(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	code = run(t.Context(), args, &out, &err)
	return code, out.String(), err.String()
}

func TestVersionIsShown(t *testing.T) {
	code, stdout, stderr := program(t, "-v")
	if code != exitOK || !strings.HasPrefix(stdout, "sendertrust v0.1.0") || !strings.Contains(stdout, "built with go") || stderr != "" {
		t.Errorf("%d, %q, %q", code, stdout, stderr)
	}
}

func TestWrongArgumentsShowTheUsage(t *testing.T) {
	for _, args := range [][]string{{"--frobnicate"}, {"-c"}, {"config.yaml"}} {
		code, stdout, stderr := program(t, args...)
		if code != exitSetup || stdout != "" || !strings.Contains(stderr, "Usage of sendertrust:") {
			t.Errorf("%v: %d, %q, %q", args, code, stdout, stderr)
		}
	}
	if code, _, stderr := program(t, "-h"); code != exitOK || !strings.Contains(stderr, "Usage of sendertrust:") {
		t.Errorf("-h: %d, %q", code, stderr)
	}
}

func TestExampleIsWrittenOnceForItsOwnerOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new.yaml")
	if code, stdout, stderr := program(t, "-e", "-c", path); code != exitOK || !strings.Contains(stdout, path) || stderr != "" {
		t.Fatalf("%d, %q, %q", code, stdout, stderr)
	}
	text, err := os.ReadFile(path)
	if err != nil || string(text) != exampleConfig {
		t.Errorf("wrong file: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err = os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := program(t, "-e", "-c", path)
	if want := path + ": is there already and was not touched; name another file with -c\n"; code != exitSetup || stderr != want {
		t.Errorf("%d, %q", code, stderr)
	}
	if text, err = os.ReadFile(path); err != nil || string(text) != "mine" {
		t.Errorf("the file was overwritten: %v", err)
	}
}

func TestExampleGoesToStandardOutput(t *testing.T) {
	if code, stdout, stderr := program(t, "-e", "-c", "-"); code != exitOK || stdout != exampleConfig || stderr != "" {
		t.Errorf("%d, %q, %q", code, stdout, stderr)
	}
}

func TestConfigMistakesAreToldAsTheyAre(t *testing.T) {
	t.Chdir(t.TempDir())
	code, stdout, stderr := program(t)
	if code != exitSetup || stdout != "" || stderr != "config.yaml: is not there; make it with: sendertrust -e -c config.yaml\n" {
		t.Errorf("%d, %q, %q", code, stdout, stderr)
	}
	filled := strings.Replace(exampleConfig, `password: ""`, "password: hunter2", 1)
	if err := os.WriteFile("config.yaml", []byte(filled), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, stderr = program(t, "-n", "--check")
	if code != exitSetup || !strings.HasPrefix(stderr, `config.yaml: encryption.pickle_key: "generate" would be lost, because -n`) {
		t.Errorf("%d, %q", code, stderr)
	}
}

func TestLogThatCannotBeOpenedIsAConfigMistake(t *testing.T) {
	t.Chdir(t.TempDir())
	filled := strings.NewReplacer(`password: ""`, "password: hunter2",
		"    writers: []", "    writers: [{type: file, filename: config.yaml/x.log}]").Replace(exampleConfig)
	if err := os.WriteFile("config.yaml", []byte(filled), 0o600); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := program(t)
	if code != exitSetup || !strings.HasPrefix(stderr, "config.yaml: logging: ") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("%d, %q", code, stderr)
	}
}

func TestExitCodeTellsWhoMustAct(t *testing.T) {
	for _, test := range []struct {
		err  error
		code int
		text string
	}{
		{nil, exitOK, ""},
		{errors.New("no route to host"), exitFailed, "sendertrust: no route to host\n"},
		{bot.ErrSetup, exitSetup, "sendertrust: " + bot.ErrSetup.Error() + "\n"},
		{fmt.Errorf("wrong password: %w", bot.ErrSetup), exitSetup, "sendertrust: wrong password: " + bot.ErrSetup.Error() + "\n"},
		{&bot.ConfigError{Faults: []string{"config.yaml: a", "config.yaml: b"}}, exitSetup, "config.yaml: a\nconfig.yaml: b\n"},
	} {
		var stderr bytes.Buffer
		if code := report(test.err, &stderr); code != test.code || stderr.String() != test.text {
			t.Errorf("%v: %d, %q", test.err, code, stderr.String())
		}
	}
}

func TestLogGoesToStandardOutputWithoutColoursIfThatIsNoTerminal(t *testing.T) {
	var stdout bytes.Buffer
	zeroconfig.Stdout = &stdout
	defer func() { zeroconfig.Stdout = os.Stdout }()
	level := zerolog.InfoLevel
	log, err := newLogger(zeroconfig.Config{MinLevel: &level}, nil)
	if err != nil {
		t.Fatal(err)
	}
	log.Debug().Msg("hidden")
	log.Info().Str("room", "!a:b").Msg("shown")
	if line := stdout.String(); !strings.HasSuffix(line, " INF shown room=!a:b\n") || strings.ContainsAny(line, "{\x1b") {
		t.Errorf("%q", line)
	}
}

// What a homeserver says goes into errors, and it knows the token: see bot.Mask.
func TestLogHidesSecretsThatOthersRepeat(t *testing.T) {
	file := filepath.Join(t.TempDir(), "bot.log")
	config := new(bot.Config)
	config.Account.AccessToken = `a "token" & more`
	mask := bot.NewMask(config)
	log, err := newLogger(zeroconfig.Config{Writers: []zeroconfig.WriterConfig{
		{Type: zeroconfig.WriterTypeFile, FileConfig: zeroconfig.FileConfig{Filename: file}},
		{Type: zeroconfig.WriterTypeFile, Format: zeroconfig.LogFormatPretty, FileConfig: zeroconfig.FileConfig{Filename: file + "2"}},
	}}, mask)
	if err != nil {
		t.Fatal(err)
	}
	mask.Hide("another token")
	refused := errors.New(`unknown token: a "token" & more, not another token`)
	log.Err(refused).Msg("Failed to sync")
	for _, path := range []string{file, file + "2"} {
		written, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(written), "unknown token: [redacted], not [redacted]") {
			t.Errorf("%s, %v", written, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
	}
	var stderr bytes.Buffer
	if report(refused, mask.Writer(&stderr)); stderr.String() != "sendertrust: unknown token: [redacted], not [redacted]\n" {
		t.Errorf("%q", stderr.String())
	}
}

func TestSecondSignalEndsTheProgramAtOnce(t *testing.T) {
	for _, signal := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		command := exec.CommandContext(t.Context(), os.Args[0])
		command.Env = append(os.Environ(), waitForSignals+"=yes")
		pipe, err := command.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err = command.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(pipe)
		for _, want := range []string{"started\n", "stopping\n"} {
			if line, err := lines.ReadString('\n'); err != nil || line != want {
				t.Fatalf("%q, %v", line, err)
			}
			if err = command.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
		}
		if rest, err := io.ReadAll(lines); err != nil || len(rest) > 0 {
			t.Errorf("%q, %v", rest, err)
		}
		var exit *exec.ExitError
		if err = command.Wait(); !errors.As(err, &exit) || exit.ExitCode() != exitFailed {
			t.Errorf("%v: %v", signal, err)
		}
	}
}

// Package botproc builds the bot and runs it as the process that it is for its users: a binary, a configuration file, signals.
package botproc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"gopkg.in/yaml.v3"
	"maunium.net/go/mautrix/id"
)

const (
	// ReadyMessage is what the bot logs when it answers.
	ReadyMessage = "Bot is ready"
	// StandByMessage is what it logs when another process has its database.
	StandByMessage = "standing by until it is gone"
	// testLimit is more than any test but those of the limits comes to.
	testLimit = 100_000
	// mostLogMegabytes is more than any test lets a bot log: nothing of it is to be thrown away.
	mostLogMegabytes = 100_000
)

// Config is the bot's configuration as its YAML file has it.
type Config = map[string]any

// Options say which bot is to run.
type Options struct {
	// Binary is what [Build] made.
	Binary     string
	Homeserver string
	UserID     id.UserID
	Password   string
	// Dir takes the configuration and the database. It must exist, and outlives the bot.
	Dir string
	// Configure changes the configuration before it is written. Nil: no change.
	Configure func(Config)
	// LogFile, if set, takes the whole log, and what [Bot.Log] gives is only what is worth mentioning: for bots that run long.
	LogFile string
	// Env are more variables of the process's environment, as "NAME=value".
	Env []string
}

// Bot is a bot's process, which may be stopped and started again on the same database.
type Bot struct {
	UserID  id.UserID
	options Options
	process *process
	// earlier is what the processes before this one logged.
	earlier []string
}

// process is one run of the bot.
type process struct {
	cmd *exec.Cmd
	log *logLines
	// exited is closed when the process has ended; err is why then.
	exited chan struct{}
	err    error
}

// Build compiles the bot from the module's root into a directory, and gives the path of the binary.
func Build(ctx context.Context, projectRoot, dir string) (string, error) {
	return BuildWith(ctx, projectRoot, filepath.Join(dir, "sendertrust"))
}

// BuildWith compiles the bot to a path of the caller's, with more arguments for go build. The last -tags of them counts, and has to
// have goolm in it.
func BuildWith(ctx context.Context, projectRoot, binary string, arguments ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", slices.Concat([]string{"build", "-tags", "goolm", "-o", binary}, arguments, []string{"."})...)
	cmd.Dir = projectRoot
	if output, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("failed to build the bot: %w\n%s", err, output)
	}
	return binary, nil
}

// ProjectRoot is the directory of the module that the caller's working directory is in.
func ProjectRoot(ctx context.Context) (string, error) {
	output, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("failed to find the module's root: %w", err)
	}
	return strings.TrimSpace(string(output)), nil
}

// Start writes the configuration, starts the bot and waits until it is ready.
func Start(ctx context.Context, options Options) (*Bot, error) {
	bot, err := newBot(options)
	if err != nil {
		return nil, err
	}
	return bot, bot.Restart(ctx)
}

// StartStandBy is Start for a bot whose database another one has: it waits until the bot stands by.
func StartStandBy(ctx context.Context, options Options) (*Bot, error) {
	bot, err := newBot(options)
	if err != nil {
		return nil, err
	}
	return bot, bot.RestartStandBy(ctx)
}

// newBot writes the configuration.
func newBot(options Options) (*Bot, error) {
	bot := &Bot{UserID: options.UserID, options: options}
	config := Config{
		"homeserver": Config{"address": options.Homeserver},
		"account":    Config{"user_id": options.UserID.String(), "password": options.Password, "recovery_key": "generate"},
		"database":   Config{"type": "sqlite3-fk-wal-fullsync", "uri": "file:" + bot.DBPath() + "?_txlock=immediate"},
		"encryption": Config{"pickle_key": "generate"},
		"invites":    Config{"allow": []string{"@*:localhost"}},
		// The people of the tests write and invite much faster than people do.
		"limits":  Config{"answers_per_sender": testLimit, "answers_per_room": testLimit, "invites_per_sender": testLimit, "invites": testLimit},
		"logging": Config{"min_level": "trace", "writers": []Config{{"type": "stdout", "format": "json"}}},
	}
	if options.LogFile != "" {
		config["logging"] = Config{"min_level": "trace", "writers": []Config{
			{"type": "stdout", "format": "json", "min_level": "info"},
			{"type": "file", "format": "json", "filename": options.LogFile, "max_size": mostLogMegabytes},
		}}
	}
	if options.Configure != nil {
		options.Configure(config)
	}
	return bot, bot.writeConfig(config)
}

// ConfigPath is the bot's configuration file. The bot writes generated secrets into it.
func (b *Bot) ConfigPath() string { return filepath.Join(b.options.Dir, "config.yaml") }

// Config reads the configuration, as the bot has completed it.
func (b *Bot) Config() (config Config, err error) {
	written, err := os.ReadFile(b.ConfigPath())
	if err == nil {
		err = yaml.Unmarshal(written, &config)
	}
	if err != nil {
		return nil, fmt.Errorf("failed to read the bot's configuration: %w", err)
	}
	return config, nil
}

// Reconfigure changes the configuration, for the next [Bot.Restart].
func (b *Bot) Reconfigure(change func(Config)) error {
	config, err := b.Config()
	if err != nil {
		return err
	}
	change(config)
	return b.writeConfig(config)
}

func (b *Bot) writeConfig(config Config) error {
	written, err := yaml.Marshal(config)
	if err == nil {
		err = os.WriteFile(b.ConfigPath(), written, 0o600)
	}
	if err != nil {
		return fmt.Errorf("failed to write the bot's configuration: %w", err)
	}
	return nil
}

// DBPath is the bot's SQLite database.
func (b *Bot) DBPath() string { return filepath.Join(b.options.Dir, "sendertrust.db") }

// Restart starts the bot after a stop, with the configuration and the database as they are, and waits until it is ready.
func (b *Bot) Restart(ctx context.Context) error { return b.restart(ctx, ReadyMessage) }

// RestartStandBy starts the bot after a stop, and waits until it stands by.
func (b *Bot) RestartStandBy(ctx context.Context) error { return b.restart(ctx, StandByMessage) }

func (b *Bot) restart(ctx context.Context, until string) error {
	if err := b.Launch(); err != nil {
		return err
	}
	err := b.process.waitForLine(ctx, until)
	if err == nil {
		return nil
	}
	b.Kill()
	return fmt.Errorf("the bot did not get so far: %w\n%s", err, b.Tail(20))
}

// Launch starts the bot after a stop, and does not wait until it has got anywhere. The variables are added to those of the options.
func (b *Bot) Launch(env ...string) error {
	if b.process != nil {
		if !b.process.ended() {
			return errors.New("the bot is still running")
		}
		b.earlier = append(b.earlier, b.process.log.lines()...)
	}
	run := &process{log: newLogLines(), exited: make(chan struct{})}
	run.cmd = exec.Command(b.options.Binary, "-c", b.ConfigPath())
	run.cmd.Dir = b.options.Dir
	run.cmd.Env = slices.Concat(os.Environ(), b.options.Env, env)
	run.cmd.Stdout, run.cmd.Stderr = run.log, run.log
	// A group of its own, so that Ctrl-C in a terminal reaches only us; and it ends when we do.
	run.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := run.cmd.Start(); err != nil {
		return fmt.Errorf("failed to start the bot: %w", err)
	}
	b.process = run
	go func() {
		run.err = run.cmd.Wait()
		close(run.exited)
	}()
	return nil
}

// Exited is closed when the process that runs now has ended.
func (b *Bot) Exited() <-chan struct{} { return b.process.exited }

// ExitCode is the code that the process has ended with; -1 while it runs, or if a signal has ended it.
func (b *Bot) ExitCode() int {
	if !b.process.ended() {
		return -1
	}
	return b.process.cmd.ProcessState.ExitCode()
}

// WaitForLog waits until the process that runs now has written a line that contains all the words.
func (b *Bot) WaitForLog(ctx context.Context, words ...string) error {
	return b.process.waitForLine(ctx, words...)
}

func (p *process) waitForLine(ctx context.Context, words ...string) error {
	for {
		lines, more := p.log.wait()
		if len(mentioning(lines, words)) > 0 {
			return nil
		}
		select {
		case <-more:
		case <-p.exited:
			if lines, _ = p.log.wait(); len(mentioning(lines, words)) > 0 {
				return nil
			}
			return fmt.Errorf("the bot has ended (%v) without logging %q", p.err, words)
		case <-ctx.Done():
			return fmt.Errorf("the bot did not log %q: %w", words, context.Cause(ctx))
		}
	}
}

func (p *process) ended() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// Stop asks the bot to end (SIGTERM), and waits for it. It gives the exit code and how long the bot took; a bot that does not
// end before the context does is killed.
func (b *Bot) Stop(ctx context.Context) (exitCode int, took time.Duration, err error) {
	begin := time.Now()
	if err = b.process.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return -1, 0, fmt.Errorf("failed to signal the bot: %w", err)
	}
	select {
	case <-b.process.exited:
		return b.process.cmd.ProcessState.ExitCode(), time.Since(begin), nil
	case <-ctx.Done():
		b.Kill()
		return -1, time.Since(begin), fmt.Errorf("the bot did not end: %w", context.Cause(ctx))
	}
}

// Kill ends the bot without warning (SIGKILL), and waits until it is gone. It does nothing to a bot that has ended.
func (b *Bot) Kill() {
	if b.process == nil {
		return
	}
	_ = b.process.cmd.Process.Kill()
	<-b.process.exited
}

// Pause stops the process where it is (SIGSTOP), and Resume has it go on (SIGCONT).
func (b *Bot) Pause() error { return b.process.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume undoes [Bot.Pause].
func (b *Bot) Resume() error { return b.process.cmd.Process.Signal(syscall.SIGCONT) }

// PID is the process's ID.
func (b *Bot) PID() int { return b.process.cmd.Process.Pid }

// Running says whether the process is alive.
func (b *Bot) Running() bool { return b.process != nil && !b.process.ended() }

// RSS is the resident memory of the process, in bytes.
func (b *Bot) RSS() (int64, error) { return b.memory("VmRSS:") }

// PeakRSS is the most resident memory that the process has had so far, in bytes.
func (b *Bot) PeakRSS() (int64, error) { return b.memory("VmHWM:") }

func (b *Bot) memory(field string) (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.process.cmd.Process.Pid))
	if err != nil {
		return 0, fmt.Errorf("failed to read the bot's memory: %w", err)
	}
	for line := range strings.Lines(string(status)) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == field {
			kib, err := strconv.ParseInt(fields[1], 10, 64)
			return kib * 1024, err
		}
	}
	return 0, errors.New("the bot has no memory: it has ended")
}

// Log gives all lines that the bot wrote, those of earlier runs included.
func (b *Bot) Log() []string {
	if b.process == nil {
		return b.earlier
	}
	return append(b.earlier[:len(b.earlier):len(b.earlier)], b.process.log.lines()...)
}

// Tail gives the last lines that the bot wrote, as one string.
func (b *Bot) Tail(count int) string {
	lines := b.Log()
	return strings.Join(lines[max(0, len(lines)-count):], "\n")
}

// LogMentioning gives the lines that contain all the words.
func (b *Bot) LogMentioning(words ...string) []string { return mentioning(b.Log(), words) }

func mentioning(lines, words []string) (found []string) {
lines:
	for _, line := range lines {
		for _, word := range words {
			if !strings.Contains(line, word) {
				continue lines
			}
		}
		found = append(found, line)
	}
	return found
}

// CheckLog says what is wrong with the log: lines that contain one of the secrets, and lines that are not JSON objects, as the stack
// of a panic is not. The password and the keys in the configuration count as secrets.
func (b *Bot) CheckLog(secrets ...string) error {
	configured, err := b.configuredSecrets()
	if err != nil {
		return err
	}
	var faults []error
	var foreign []string
	for _, line := range b.Log() {
		if !json.Valid([]byte(line)) {
			foreign = append(foreign, line)
		}
		for _, secret := range append(configured, secrets...) {
			if secret != "" && strings.Contains(line, secret) {
				faults = append(faults, fmt.Errorf("the log contains the secret %q: %s", secret, line))
			}
		}
	}
	if len(foreign) > 0 {
		shown := strings.Join(foreign[:min(len(foreign), mostForeignLines)], "\n")
		faults = append(faults, fmt.Errorf("the bot wrote %d lines that are not log events:\n%s", len(foreign), shown))
	}
	return errors.Join(faults...)
}

// mostForeignLines is enough of a panic's stack to see where it came from.
const mostForeignLines = 40

// configuredSecrets reads the secrets in the configuration, as the bot has completed it.
func (b *Bot) configuredSecrets() ([]string, error) {
	config, err := b.Config()
	if err != nil {
		return nil, err
	}
	text := func(section, key string) string {
		settings, _ := config[section].(Config)
		value, _ := settings[key].(string)
		return value
	}
	return []string{
		text("account", "password"), text("account", "access_token"), text("account", "recovery_key"), text("encryption", "pickle_key"),
	}, nil
}

// logLines collects what the bot writes, line by line.
type logLines struct {
	lock    sync.Mutex
	whole   []string
	partial strings.Builder
	// more is closed, and replaced, when there are new lines.
	more chan struct{}
}

func newLogLines() *logLines { return &logLines{more: make(chan struct{})} }

func (l *logLines) Write(written []byte) (int, error) {
	l.lock.Lock()
	defer l.lock.Unlock()
	for chunk := range strings.Lines(string(written)) {
		l.partial.WriteString(chunk)
		if strings.HasSuffix(chunk, "\n") {
			l.whole = append(l.whole, strings.TrimSuffix(l.partial.String(), "\n"))
			l.partial.Reset()
		}
	}
	close(l.more)
	l.more = make(chan struct{})
	return len(written), nil
}

// wait gives the lines so far, and a channel that is closed when there are more.
func (l *logLines) wait() ([]string, <-chan struct{}) {
	l.lock.Lock()
	defer l.lock.Unlock()
	return l.whole[:len(l.whole):len(l.whole)], l.more
}

func (l *logLines) lines() []string {
	lines, _ := l.wait()
	return lines
}

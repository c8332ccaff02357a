// Command sendertrust is a Matrix bot that tells rooms who really sent each encrypted message.
package main

import (
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"syscall"

	"github.com/mattn/go-isatty"
	"github.com/rs/zerolog"
	"go.mau.fi/util/exzerolog"
	"go.mau.fi/util/progver"
	"go.mau.fi/zeroconfig"

	"sendertrust/bot"
)

//go:embed config.example.yaml
var exampleConfig string

// Set by the linker: -X main.tag=v0.1.0 -X main.commit=… -X main.buildTime=2026-01-01T00:00:00Z.
var tag, commit, buildTime string

var version = progver.ProgramVersion{Name: "sendertrust", BaseVersion: "0.1.0"}

// The exit codes.
const (
	exitOK     = 0
	exitFailed = 1 // something went wrong that may go right the next time
	exitSetup  = 2 // somebody must change the command line, the config or the account first
)

func main() {
	// What the program writes (the database, logs) is for its own user alone.
	syscall.Umask(0o077)
	os.Exit(run(untilSignal(), os.Args[1:], os.Stdout, os.Stderr))
}

// run is the program, from its arguments to its exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("sendertrust", flag.ContinueOnError)
	flags.SetOutput(stderr)
	configPath := flags.String("c", "config.yaml", "the `file` with the settings")
	writeExample := flags.Bool("e", false, "write an example of the settings to the file of -c (with -c -: to standard output), and exit")
	readOnly := flags.Bool("n", false, "never write to the file with the settings")
	checkOnly := flags.Bool("check", false, "check the settings, the database and the connection to the homeserver, say what is found, and exit")
	showVersion := flags.Bool("v", false, "show the version, and exit")
	proofPath := flags.String("verify-proof", "", "check the proof in the `file` that the bot has made of a message, say what it proves, and exit; needs --master-key")
	masterKey := flags.String("master-key", "", "the master `key` of the bot that is said to have made the proof of --verify-proof, as !trust status shows it")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return exitOK
	} else if err != nil {
		return exitSetup
	}
	switch {
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "unexpected argument: %s\n", flags.Arg(0))
		flags.Usage()
		return exitSetup
	case *proofPath != "" || *masterKey != "":
		return verifyProof(*proofPath, *masterKey, stdout, stderr)
	case *showVersion:
		fmt.Fprintln(stdout, version.Init(tag, commit, buildTime).VersionDescription)
		return exitOK
	case *writeExample:
		return report(saveExample(*configPath, stdout), stderr)
	}

	config, err := bot.Load(*configPath, bot.LoadOptions{Example: exampleConfig, ReadOnly: *readOnly})
	if err != nil {
		return report(err, stderr)
	}
	mask := bot.NewMask(config)
	stderr = mask.Writer(stderr)
	log, err := newLogger(config.Logging, mask)
	if err != nil {
		return report(&bot.ConfigError{Faults: []string{*configPath + ": logging: " + err.Error()}}, stderr)
	}
	exzerolog.SetupDefaults(log)
	ctx = log.WithContext(ctx)

	b := bot.New(config, *log)
	b.Mask = mask
	if *checkOnly {
		found, err := b.Check(ctx)
		for _, line := range found {
			fmt.Fprintln(stdout, "sendertrust:", line)
		}
		if err == nil {
			fmt.Fprintln(stdout, "sendertrust: the settings and the connection are fine")
		}
		return report(err, stderr)
	}
	log.Info().Str("version", version.Init(tag, commit, buildTime).FormattedVersion).Msg("Starting sendertrust")
	err = b.Run(ctx)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil // stopped because it was asked to
	}
	return report(err, stderr)
}

// report shows an error to the person who started the program, and returns the exit code for it.
func report(err error, stderr io.Writer) int {
	if err == nil {
		return exitOK
	}
	if fault, ok := errors.AsType[*bot.ConfigError](err); ok {
		fmt.Fprintln(stderr, fault)
		return exitSetup
	}
	fmt.Fprintf(stderr, "sendertrust: %v\n", err)
	if errors.Is(err, bot.ErrSetup) {
		return exitSetup
	}
	return exitFailed
}

// saveExample writes the example config to a new file, or to standard output if the path is "-".
func saveExample(path string, stdout io.Writer) error {
	if path == "-" {
		_, err := io.WriteString(stdout, exampleConfig)
		return err
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return &bot.ConfigError{Faults: []string{path + ": is there already and was not touched; name another file with -c"}}
	} else if err != nil {
		return err
	}
	_, err = file.WriteString(exampleConfig)
	if err = errors.Join(err, file.Close()); err == nil {
		fmt.Fprintf(stdout, "sendertrust: wrote %s; fill in the lines marked (1) to (4), then run: sendertrust --check -c %s\n", path, path)
	}
	return err
}

// newLogger makes the logger of the config, whose writers get everything masked. Without writers that is standard output, in colour if
// it is a terminal.
func newLogger(config zeroconfig.Config, mask *bot.Mask) (*zerolog.Logger, error) {
	if len(config.Writers) == 0 {
		format := zeroconfig.LogFormatPretty
		if isatty.IsTerminal(os.Stdout.Fd()) && os.Getenv("NO_COLOR") == "" {
			format = zeroconfig.LogFormatPrettyColored
		}
		config.Writers = []zeroconfig.WriterConfig{{Type: zeroconfig.WriterTypeStdout, Format: format}}
	}
	writers := make([]io.Writer, len(config.Writers))
	for i := range config.Writers {
		var err error
		if writers[i], err = config.Writers[i].Compile(); err != nil {
			return nil, fmt.Errorf("failed to open writer %d: %w", i+1, err)
		}
	}
	config.Writers = []zeroconfig.WriterConfig{{Type: zeroconfig.WriterTypeStdout}} // to be replaced
	log, err := config.Compile()
	if err != nil {
		return nil, err
	}
	masked := log.Output(mask.Writer(zerolog.MultiLevelWriter(writers...)))
	return &masked, nil
}

// untilSignal returns a context that ends at the first SIGINT or SIGTERM. The second one ends the program at once.
func untilSignal() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-signals
		cancel()
		<-signals
		os.Exit(exitFailed)
	}()
	return ctx
}

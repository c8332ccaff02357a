package bot

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rs/zerolog"
)

func TestMaskHidesEverySecretOfTheConfiguration(t *testing.T) {
	config := new(Config)
	config.Account.Password = "correct-horse"
	config.Account.AccessToken = "syt_token"
	config.Account.RecoveryKey = "EsTc LW2K PPGi"
	config.Encryption.PickleKey = "pickled-cucumber"
	config.Database.URI = "postgres://bot:p%40ssw%3Ard@localhost/bot"
	mask := NewMask(config)
	mask.Hide(Generate)
	mask.Hide("short")
	for written, want := range map[string]string{
		"correct-horse":                       "[redacted]",
		"token syt_token of correct-horse\n":  "token [redacted] of [redacted]\n",
		"EsTc LW2K PPGi":                      "[redacted]",
		"key pickled-cucumber":                "key [redacted]",
		"the password p@ssw:rd is wrong":      "the password [redacted] is wrong",
		"generate, of short, the localhost\n": "generate, of short, the localhost\n",
	} {
		var got strings.Builder
		if n, err := mask.Writer(&got).Write([]byte(written)); n != len(written) || err != nil || got.String() != want {
			t.Errorf("%q: got %q, %d, %v", written, got.String(), n, err)
		}
	}
}

func TestNoMaskHidesNothing(t *testing.T) {
	var mask *Mask
	mask.Hide("correct-horse")
	for _, mask := range []*Mask{nil, new(Mask)} {
		var got strings.Builder
		if _, err := mask.Writer(&got).WriteLevel(zerolog.InfoLevel, []byte("correct-horse")); err != nil || got.String() != "correct-horse" {
			t.Errorf("got %q, %v", got.String(), err)
		}
	}
}

type brokenWriter struct{ io.Writer }

var errDiskFull = errors.New("the disk is full")

func (brokenWriter) Write([]byte) (int, error) { return 0, errDiskFull }

func TestMaskPassesFailuresOn(t *testing.T) {
	mask := new(Mask)
	mask.Hide("correct-horse")
	if n, err := mask.Writer(brokenWriter{}).Write([]byte("correct-horse")); n != 0 || !errors.Is(err, errDiskFull) {
		t.Errorf("%d, %v", n, err)
	}
}

func TestFilesThatEverybodyMayReadAreNamed(t *testing.T) {
	dir := t.TempDir()
	config := new(Config)
	config.path = filepath.Join(dir, "config.yaml")
	config.Database.Type = "sqlite3-fk-wal"
	file := filepath.Join(dir, "the bot's.db")
	config.Database.URI = Secret("file:" + file + "?_txlock=immediate")
	var log strings.Builder
	b := New(config, zerolog.New(&log))
	expect := func(want ...string) {
		t.Helper()
		log.Reset()
		b.warnOfExposedFiles()
		lines := b.exposedFiles()
		if len(lines) != len(want) || strings.Count(log.String(), `"level":"warn"`) != len(want) {
			t.Fatalf("said %q and logged %s, want %d lines", lines, log.String(), len(want))
		}
		for i, line := range lines {
			if !strings.Contains(line, want[i]) {
				t.Errorf("said %q, want %q", line, want[i])
			}
		}
	}
	expect() // nothing is there yet
	for _, path := range []string{config.path, file, file + "-wal"} {
		writeText(t, path, "")
		if err := os.Chmod(path, 0o640); err != nil { // the group is given rights on purpose
			t.Fatal(err)
		}
	}
	expect()
	if err := errors.Join(os.Chmod(config.path, 0o644), os.Chmod(file+"-wal", 0o602)); err != nil {
		t.Fatal(err)
	}
	expect("chmod o= "+config.path, "chmod o= '"+strings.ReplaceAll(file, "'", `'\''`)+"-wal'")
	if info, err := os.Stat(config.path); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("the mode was changed to %v, %v", info.Mode(), err)
	}
	config.Database.Type, config.Database.URI = Postgres, "postgres://localhost/bot"
	expect("chmod o= " + config.path)
}

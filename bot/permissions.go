package bot

import (
	"fmt"
	"os"
	"strings"
)

// readableByAll are the rights of those who are neither the file's owner nor in its group.
const readableByAll os.FileMode = 0o007

// exposedFiles says which of the files that hold secrets everybody on this machine may read or write: the settings and an SQLite
// database. The bot makes its files for its own user alone, so somebody else has made these so; whether that was meant is theirs to say,
// and the bot does not change it. The group's rights are not looked at: they are given on purpose.
func (b *Bot) exposedFiles() (lines []string) {
	files := []string{b.config.path}
	if file, err := sqliteFile(b.config.Database.URI.Reveal()); err == nil && b.config.Database.Type != Postgres && file != ":memory:" {
		for _, suffix := range []string{"", "-wal", "-shm", "-journal"} {
			files = append(files, file+suffix)
		}
	}
	for _, file := range files {
		if info, err := os.Stat(file); err == nil && info.Mode().Perm()&readableByAll != 0 {
			lines = append(lines, fmt.Sprintf("Everybody on this machine can get at %s, which holds secrets; take the right away with: chmod o= %s", file, quoteForShell(file)))
		}
	}
	return lines
}

// warnOfExposedFiles writes into the log what exposedFiles says.
func (b *Bot) warnOfExposedFiles() {
	for _, line := range b.exposedFiles() {
		b.log.Warn().Msg(line)
	}
}

// quoteForShell makes a path fit for a command line, where it needs that.
func quoteForShell(path string) string {
	if path != "" && !strings.ContainsFunc(path, func(c rune) bool { return !strings.ContainsRune(shellSafe, c) }) {
		return path
	}
	return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
}

const shellSafe = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._/-"

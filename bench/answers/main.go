// Command answers measures a whole bot: it does the work "answers" of bench, whose own program is to hold nothing that a library's user
// does not have.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/rs/zerolog"

	"sendertrust/bench/inputs"
	"sendertrust/bench/works"
	"sendertrust/bot"
)

func main() {
	if err := works.Main(context.Background(), os.Args[1:], newBot); err != nil {
		fmt.Fprintln(os.Stderr, "answers:", err)
		os.Exit(1)
	}
}

// manyAnswers is more than the conversation has.
const manyAnswers = 1_000_000

func newBot(homeserver, dir string) interface {
	Run(ctx context.Context) error
} {
	settings := fmt.Sprintf(`
homeserver: {address: %q}
account: {user_id: %q, access_token: a token}
database: {type: sqlite3-fk-wal-fullsync, uri: %q}
encryption: {pickle_key: generate}
invites: {allow: ["@*:bench"]}
limits: {answers_per_sender: %d, answers_per_room: %d}
`, homeserver, inputs.Receiver, "file:"+filepath.Join(dir, "bot.db")+"?_txlock=immediate", manyAnswers, manyAnswers)
	file := filepath.Join(dir, "config.yaml")
	inputs.Check(os.WriteFile(file, []byte(settings), 0o600))
	config := inputs.Must(bot.Load(file, bot.LoadOptions{Environ: []string{}}))
	made := bot.New(config, zerolog.New(inputs.Must(os.Create(filepath.Join(dir, "log")))).Level(zerolog.InfoLevel))
	made.Output = inputs.Must(os.Create(filepath.Join(dir, "recovery key")))
	return made
}

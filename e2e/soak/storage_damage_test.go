package soak

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

// page is the size of a page of the bot's database.
const page = 4096

// damaged is a database that something has happened to.
type damaged struct {
	t    *testing.T
	w    *world
	bot  *botproc.Bot
	file string
	// whole is what the file was before.
	whole []byte
}

// damages are what may happen to a file while nobody uses it.
func (d *damaged) damages() map[string]func() {
	overwrite := func(at, size int) func() {
		return func() {
			file := must(os.OpenFile(d.file, os.O_WRONLY, 0))(d.t)
			garbage := make([]byte, size)
			for i := range garbage {
				garbage[i] = byte(rand.Uint32())
			}
			must(file.WriteAt(garbage, int64(at)))(d.t)
			ok(d.t, file.Close())
		}
	}
	truncate := func(size int) func() { return func() { ok(d.t, os.Truncate(d.file, int64(size))) } }
	log := d.file + "-wal"
	all := map[string]func(){
		"the first bytes":             overwrite(0, 16),
		"the header":                  overwrite(0, 100),
		"the page of the schema":      overwrite(100, page-100),
		"the second half":             overwrite(len(d.whole)/page/2*page, len(d.whole)/page/2*page),
		"cut to a half":               truncate(len(d.whole) / page / 2 * page),
		"cut within a page":           truncate(len(d.whole) - page/3),
		"cut to the header":           truncate(100),
		"emptied":                     truncate(0),
		"emptied, with its log there": func() { ok(d.t, os.WriteFile(log, []byte("what was committed last"), 0o600)); truncate(0)() },
		"taken away, with its log there": func() {
			ok(d.t, os.WriteFile(log, []byte("what was committed last"), 0o600))
			ok(d.t, os.Remove(d.file))
		},
		"a key of the account":         d.flip("crypto_account", "account"),
		"a secret key of the identity": d.flip("crypto_secrets", "secret"),
	}
	for name, root := range d.roots() {
		all["the first page of "+name] = overwrite((root-1)*page, page)
		all["some bytes in the first page of "+name] = overwrite((root-1)*page, 12)
	}
	return all
}

// roots gives the first page of each table and index that has something in it.
func (d *damaged) roots() map[string]int {
	db := d.open()
	defer db.Close()
	rows := must(db.Query("SELECT name, rootpage FROM sqlite_schema WHERE rootpage>0 AND name LIKE '%crypto%'"))(d.t)
	defer rows.Close()
	roots := make(map[string]int)
	for rows.Next() {
		var name string
		var root int
		ok(d.t, rows.Scan(&name, &root))
		roots[name] = root
	}
	ok(d.t, rows.Err())
	return roots
}

func (d *damaged) open() *sql.DB { return must(sql.Open("sqlite3", "file:"+d.file))(d.t) }

// flip changes one letter of every encrypted key of a table.
func (d *damaged) flip(table, column string) func() {
	return func() {
		db := d.open()
		statement := fmt.Sprintf(`UPDATE %[1]s SET %[2]s=CAST(substr(CAST(%[2]s AS TEXT), 1, 40) || CASE substr(CAST(%[2]s AS TEXT), 41, 1)
			WHEN 'A' THEN 'B' ELSE 'A' END || substr(CAST(%[2]s AS TEXT), 42) AS BLOB) WHERE %[2]s IS NOT NULL`, table, column)
		changed := must(must(db.Exec(statement))(d.t).RowsAffected())(d.t)
		ok(d.t, db.Close())
		if changed == 0 {
			d.t.Errorf("there is nothing in %s", table)
		}
	}
}

// content is what is in the files of the database.
func (d *damaged) content() string {
	var all []string
	for _, name := range []string{d.file, d.file + "-wal"} {
		content, err := os.ReadFile(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			d.t.Fatal(err)
		} else if err != nil {
			// An empty log is as good as none.
			content = []byte{}
		}
		all = append(all, string(content))
	}
	return strings.Join(all, "|")
}

func (d *damaged) restore() {
	_ = os.Remove(d.file + "-wal")
	_ = os.Remove(d.file + "-shm")
	ok(d.t, os.WriteFile(d.file, d.whole, 0o600))
}

// refused says what is wrong with how the bot takes a damaged database: it has to end with 2 and a clear sentence, and leave it alone; and
// so has a check.
func (d *damaged) refused() error {
	before := d.content()
	earlier := len(d.bot.Log())
	ok(d.t, d.bot.Launch())
	if err := d.ends(earlier); err != nil {
		return err
	}
	if d.content() != before {
		return errors.New("the bot has changed the file")
	}
	check := exec.Command(d.w.binary, "-c", d.bot.ConfigPath(), "--check")
	check.Dir = d.w.dir
	output, err := check.CombinedOutput()
	if code := check.ProcessState.ExitCode(); code != 2 || !bytes.Contains(output, []byte("is damaged")) {
		return fmt.Errorf("a check ends with %d (%w), and says:\n%s", code, err, output)
	}
	if d.content() != before {
		return errors.New("the check has changed the file")
	}
	return nil
}

// ends waits for the bot's end, and says what is wrong with it.
func (d *damaged) ends(earlier int) error {
	select {
	case <-d.bot.Exited():
	case <-time.After(recovery):
		d.bot.Kill()
		return errors.New("the bot goes on")
	}
	said := strings.Join(d.bot.Log()[earlier:], "\n")
	if code := d.bot.ExitCode(); code != 2 {
		return fmt.Errorf("the bot has ended with %d:\n%s", code, said)
	}
	for _, words := range []string{d.file + " is damaged (", "left as it is", "restore a backup"} {
		if !strings.Contains(said, words) {
			return fmt.Errorf("the bot does not say %q, but:\n%s", words, said)
		}
	}
	return nil
}

// A damaged database is refused, whatever is damaged, and left as it is: nothing is mended by leaving out what cannot be read.
func TestDamagedDatabaseIsRefused(t *testing.T) {
	w := theWorld(t)
	t.Parallel()
	bot := w.newBot(t, botOptions{})
	w.leaveLogAlone(bot)
	alice := w.newStranger(t, "alice")
	room := w.newRoom(t, alice, bot.UserID)
	ok(t, alice.WaitJoined(within(t, patience), room, bot.UserID))
	ask := func() id.EventID { return must(alice.Send(within(t, patience), room, say("hello")))(t) }
	answered := func(eventID id.EventID) {
		must(alice.WaitForAnswerThat(within(t, patience), eventID, func(answer people.Answer) bool { return answer.Annotation.Code == "unverified_identity" }))(t)
	}
	answered(ask())
	stop := func() {
		code, _, err := bot.Stop(within(t, patience))
		ok(t, err)
		if code != 0 {
			t.Fatalf("the bot has ended with %d", code)
		}
	}
	stop()
	d := &damaged{t: t, w: w, bot: bot, file: bot.DBPath(), whole: must(os.ReadFile(bot.DBPath()))(t)}
	r := result{part: "storage", what: "damaged file", note: "of tries, those that are refused and left alone are held"}
	tried := 0
	for name, damage := range d.damages() {
		if tried++; tried > often(8, 1000) {
			break
		}
		damage()
		err := d.refused()
		d.note(&r, name, err)
		d.restore()
	}

	// What does not show at the start ends the bot when it comes to it. From a backup it goes on.
	for range often(1, 3) {
		d.flip("crypto_megolm_inbound_session", "session")()
		earlier := len(bot.Log())
		ok(t, bot.Restart(within(t, patience)))
		eventID := ask()
		d.note(&r, "the key of a session", d.ends(earlier))
		d.restore()
		ok(t, bot.Restart(within(t, patience)))
		answered(eventID)
		stop()
		d.whole = must(os.ReadFile(d.file))(t)
	}
	for range often(1, 5) {
		ok(t, bot.Restart(within(t, patience)))
		earlier := len(bot.Log())
		file := must(os.OpenFile(d.file, os.O_WRONLY, 0))(t)
		must(file.WriteAt(bytes.Repeat([]byte{0xa5}, len(d.whole)-page), page))(t)
		ok(t, file.Close())
		d.note(&r, "all pages, while the bot runs", d.endsWhileAsked(earlier, ask))
		d.restore()
	}
	ok(t, bot.Restart(within(t, patience)))
	check(t, r)
}

// leaveLogAlone has a bot's log not be searched at the end: what it says when it refuses to go on is for people, and no log event.
func (w *world) leaveLogAlone(bot *botproc.Bot) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if at := slices.Index(w.bots, bot); at >= 0 {
		w.bots = slices.Delete(w.bots, at, at+1)
	}
}

// endsWhileAsked has somebody ask until the bot ends.
func (d *damaged) endsWhileAsked(earlier int, ask func() id.EventID) error {
	ctx, cancel := context.WithTimeout(d.t.Context(), recovery)
	defer cancel()
	for d.bot.Running() && ctx.Err() == nil {
		ask()
		_ = pause(ctx, 200*time.Millisecond)
	}
	return d.ends(earlier)
}

func (d *damaged) note(r *result, what string, err error) {
	r.tries, r.messages = r.tries+1, r.messages+1
	if err == nil {
		r.held++
		return
	}
	r.wrong++
	d.t.Errorf("%s: %v", what, err)
}

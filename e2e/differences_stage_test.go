package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
	"sendertrust/e2e/botproc"
	"sendertrust/e2e/element"
	"sendertrust/e2e/people"
	"sendertrust/e2e/stock"
)

const (
	// settling is how long the watchers may take to say what is expected of them, before what they say then is taken.
	settling = 25 * time.Second
	lookBack = 100 * time.Millisecond
	// cannotBePlayed begins the cell of a scenario that mautrix has no means for; the reason follows.
	cannotBePlayed = "—"
)

// differencesStage is where the scenarios are played: three who watch, of the same knowledge.
type differencesStage struct {
	*differencesTable
	w       *world
	bot     *botproc.Bot
	element *element.Client
	stock   *stock.Client
	// operator is another device of the bot's account, on which people are verified.
	operator *stock.Client
	// pinned are verified by the bot's configuration.
	pinned []*people.Person
}

func newDifferencesStage(t *testing.T, w *world, table *differencesTable) *differencesStage {
	t.Helper()
	ctx := within(t, startPatience)
	s := &differencesStage{differencesTable: table, w: w}
	carol, carolsKey := w.newStranger(t, "carol")
	dave, davesKey := w.newStranger(t, "dave")
	s.pinned = []*people.Person{carol, dave}
	s.bot = w.newBot(t, func(config botproc.Config) {
		pin(config, carol.UserID, carolsKey)
		pin(config, dave.UserID, davesKey)
	})
	s.element = w.newElement(t, "watcher")
	must(s.element.BootstrapCrossSigning(ctx))(t)
	s.stock = w.newStock(t, must(w.register(ctx, "stock"))(t))
	ok(t, s.stock.BootstrapCrossSigning(ctx))
	s.operator = w.newStock(t, s.bot.UserID.String())
	account := must(s.bot.Config())(t)["account"].(botproc.Config)
	ok(t, s.operator.UseRecoveryKey(ctx, account["recovery_key"].(string)))
	return s
}

func (w *world) newStock(t *testing.T, user string) *stock.Client {
	t.Helper()
	dir := must(os.MkdirTemp(w.dir, "stock-"))(t)
	client := must(stock.Login(within(t, patience), w.server.URL, user, password, filepath.Join(dir, "stock.db")))(t)
	t.Cleanup(func() { ok(t, client.Close()) })
	return client
}

// room makes a room of the host's with the three who watch and the guests in it.
func (s *differencesStage) room(t *testing.T, encrypted bool, host *people.Person, guests ...*people.Person) id.RoomID {
	t.Helper()
	ctx := within(t, patience)
	room := newRoom(t, encrypted, s.bot, host, guests...)
	ok(t, host.Invite(ctx, room, s.element.UserID()))
	ok(t, host.Invite(ctx, room, s.stock.UserID))
	ok(t, s.element.Join(ctx, room))
	ok(t, s.stock.Join(ctx, room))
	for _, member := range append([]*people.Person{host}, guests...) {
		ok(t, member.WaitJoined(ctx, room, s.element.UserID()))
		ok(t, member.WaitJoined(ctx, room, s.stock.UserID))
		s.learn(t, member.UserID)
	}
	return room
}

// learn has Element and mautrix ask for a user's keys, so that what they say is not due to what they could not know yet. The bot is not
// helped.
func (s *differencesStage) learn(t *testing.T, user id.UserID) {
	t.Helper()
	ctx := within(t, patience)
	here, there := must(s.element.Learn(ctx, user))(t), must(s.stock.Learn(ctx, user))(t)
	if here != there {
		t.Fatalf("Element has learned the master key %q of %s, mautrix %q", here, user, there)
	}
}

// verify has all three verify somebody. The bot learns of it from the homeserver; the answer to a message of the person's shows when.
func (s *differencesStage) verify(t *testing.T, person *people.Person, told id.EventID) {
	t.Helper()
	ctx := within(t, patience)
	ok(t, s.operator.VerifyUser(ctx, person.UserID))
	must(s.element.VerifyUser(ctx, person.UserID))(t)
	ok(t, s.stock.VerifyUser(ctx, person.UserID))
	must(person.WaitForAnswerThat(ctx, told, saying(cryptohook.CodeVerified)))(t)
}

// saying is for [people.Person.WaitForAnswerThat].
func saying(code cryptohook.Code) func(people.Answer) bool {
	return func(answer people.Answer) bool { return answer.Annotation.Code == string(code) }
}

// share gives the key of a session to all three.
func (s *differencesStage) share(t *testing.T, from *people.Person, session *people.Session, forgeries ...people.Forgery) {
	t.Helper()
	for _, to := range []id.UserID{s.bot.UserID, s.element.UserID(), s.stock.UserID} {
		ok(t, from.ShareKey(within(t, patience), session, to, forgeries...))
	}
}

// pause keeps all three from noticing anything until the function that it gives is called.
func (s *differencesStage) pause(t *testing.T) (resume func()) {
	t.Helper()
	ok(t, s.bot.Pause())
	ok(t, syscall.Kill(s.element.PID(), syscall.SIGSTOP))
	s.stock.Pause()
	return func() {
		s.stock.Start(t.Context())
		ok(t, syscall.Kill(s.element.PID(), syscall.SIGCONT))
		ok(t, s.bot.Resume())
	}
}

// judge notes what the three say of a new message. The reader is somebody in the room who reads the bot's answer.
func (s *differencesStage) judge(t *testing.T, name string, reader *people.Person, eventID id.EventID) {
	t.Helper()
	row := s.row(t, name)
	answer := s.answer(t, row, reader, eventID)
	if answer.Edits > 0 {
		t.Errorf("%s: the bot said %s first, and corrected itself", name, answer.First)
	}
	look := s.stock.Trust
	if row.Ours == string(cryptohook.CodeUnableToDecrypt) {
		look = s.stock.TrustNow
	}
	s.note(t, row, eventID, answer, look)
}

// again notes what the three say now of an earlier message.
func (s *differencesStage) again(t *testing.T, name string, reader *people.Person, eventID id.EventID) {
	t.Helper()
	row := s.row(t, name)
	s.note(t, row, eventID, s.answer(t, row, reader, eventID), s.stock.TrustNow)
}

// answer waits until the bot says what is expected of it, or what it says when it should have done so.
func (s *differencesStage) answer(t *testing.T, row *differencesRow, reader *people.Person, eventID id.EventID) people.Answer {
	t.Helper()
	answer, err := reader.WaitForAnswerThat(within(t, settling), eventID, saying(cryptohook.Code(row.Ours)))
	if err != nil {
		t.Errorf("%s: the bot was to say %s: %v", row.Name, row.Ours, err)
		answer = must(reader.WaitForAnswer(within(t, settling), eventID))(t)
	}
	if answer.Malformed != nil {
		t.Errorf("%s: %v", row.Name, answer.Malformed)
	}
	if shield := string(cryptohook.Code(answer.Annotation.Code).LaxShield()); answer.Annotation.Shield != shield {
		t.Errorf("%s: the bot's shield is %s, not %s", row.Name, answer.Annotation.Shield, shield)
	}
	return *answer
}

// note asks Element and mautrix, compares what the three say with what is expected, and keeps it.
func (s *differencesStage) note(t *testing.T, row *differencesRow, eventID id.EventID, answer people.Answer, look func(context.Context, id.EventID) (string, error)) {
	t.Helper()
	code := cryptohook.Code(answer.Annotation.Code)
	theirs := s.askElement(t, eventID, row)
	trust := row.Mautrix
	if !strings.HasPrefix(trust, cannotBePlayed) {
		trust = "`" + must(look(within(t, 2*settling), eventID))(t) + "`"
	}
	if theirs.cell() != row.Element {
		t.Errorf("%s: Element says %s, not %s", row.Name, theirs.cell(), row.Element)
	}
	if trust != row.Mautrix {
		t.Errorf("%s: mautrix says %s, not %s", row.Name, trust, row.Mautrix)
	}
	differs := !theirs.agreesWith(code)
	if differs != (row.Why != "") {
		t.Errorf("%s: %s differs from %s: %v; a reason is given: %v", row.Name, oursCell(code), theirs.cell(), differs, row.Why != "")
	}
	row.Ours, row.Element, row.Mautrix, row.differs = string(code), theirs.cell(), trust, differs
}

// askElement waits until Element says what is expected of it, or gives what it says when it should have done so.
func (s *differencesStage) askElement(t *testing.T, eventID id.EventID, row *differencesRow) (says elementSays) {
	t.Helper()
	until, again := time.Now().Add(settling), time.NewTicker(lookBack)
	defer again.Stop()
	for {
		seen := must(s.element.Look(within(t, patience), eventID))(t)
		says = elementSays{Shields: seen.Shields, failure: seen.Failure}
		if says.cell() == row.Element || time.Now().After(until) {
			return says
		}
		<-again.C
	}
}

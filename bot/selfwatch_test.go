package bot

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// watchedBot is a self watch on a real database, with rooms and a homeserver around it.
type watchedBot struct {
	*selfWatch
	t       *testing.T
	now     time.Time
	open    func() *dbutil.Database
	shown   cryptohook.OwnIdentity
	members []id.RoomID
	// told are the messages that the homeserver has taken, without those that it has had before; failing and refusing rooms take none.
	told              []sentEvent
	failing, refusing id.RoomID
	signs             int
	onSign            func()
	logged            strings.Builder
}

const ownMaster = id.Ed25519("ours")

func newWatchedBot(t *testing.T) *watchedBot {
	t.Helper()
	w := &watchedBot{
		t: t, now: time.UnixMilli(1_700_000_000_000), open: newDatabase(t), members: []id.RoomID{"!one:example.org", "!two:example.org"},
		shown: cryptohook.OwnIdentity{State: cryptohook.OwnFine, MasterKey: ownMaster, PublishedMasterKey: ownMaster},
	}
	w.start()
	return w
}

// start begins anew on the same database.
func (w *watchedBot) start() {
	w.t.Helper()
	b := testBot(w.t)
	b.clock, b.log, b.db = func() time.Time { return w.now }, zerolog.New(&w.logged), w.open()
	b.config.Account.UserID = "@bot:example.org"
	w.selfWatch = b.newSelfWatch()
	w.own = func() cryptohook.OwnIdentity { return w.shown }
	w.rooms = func(context.Context) ([]id.RoomID, error) { return w.members, nil }
	w.send = func(_ context.Context, roomID id.RoomID, content *event.Content, txnID string) (bool, error) {
		switch roomID {
		case w.failing:
			return false, errors.New("the homeserver is away")
		case w.refusing:
			return true, errors.New("the homeserver refuses it")
		}
		if !slices.ContainsFunc(w.told, func(told sentEvent) bool { return told.txnID == txnID && told.roomID == roomID }) {
			w.told = append(w.told, sentEvent{roomID, txnID, map[string]any{"body": content.AsMessage().Body}})
		}
		return false, nil
	}
	w.sign = func(context.Context) error {
		w.signs++
		if w.onSign != nil {
			w.onSign()
		}
		return nil
	}
	if err := w.records.Upgrade(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// shows has the homeserver say so, for the first time now.
func (w *watchedBot) shows(state cryptohook.OwnState) {
	w.shown.State, w.shown.Since, w.shown.CheckedAt = state, w.now, w.now
	w.changed(w.shown)
}

// later lets time pass; the homeserver goes on saying what it said.
func (w *watchedBot) later(d time.Duration) {
	w.now = w.now.Add(d)
	w.shown.CheckedAt = w.now
}

// works does a round, and gives what was told in it.
func (w *watchedBot) works() []sentEvent {
	w.t.Helper()
	before := len(w.told)
	if _, err := w.round(w.t.Context()); err != nil && w.failing == "" {
		w.t.Fatal(err)
	}
	return w.told[before:]
}

func (w *watchedBot) holds() bool {
	ctx, cancel := context.WithCancel(w.t.Context())
	cancel()
	_, ok := w.hold(ctx)
	return !ok
}

func (w *watchedBot) errorsLogged() int { return strings.Count(w.logged.String(), `"level":"error"`) }

var doubts = []cryptohook.OwnState{
	cryptohook.OwnDeviceMissing, cryptohook.OwnDeviceChanged, cryptohook.OwnSignatureMissing, cryptohook.OwnOtherIdentity,
}

func TestDoubtHoldsAnswersAtOnceAndTellsEachRoomOnce(t *testing.T) {
	for _, state := range doubts {
		t.Run(string(state), func(t *testing.T) {
			w := newWatchedBot(t)
			if told := w.works(); len(told) > 0 || w.holds() {
				t.Fatalf("told %v while everything is fine", told)
			}
			w.shows(state)
			if !w.holds() {
				t.Error("does not hold answers")
			}
			w.works()
			if told := w.works(); len(told) > 0 {
				t.Errorf("told %v by a single answer of the homeserver", told)
			}
			if w.errorsLogged() != 1 {
				t.Errorf("logged %d errors", w.errorsLogged())
			}
			w.later(ownConfirm)
			told := w.works()
			if len(told) != 2 || told[0].roomID == told[1].roomID {
				t.Fatalf("told %v", told)
			}
			for _, notice := range told {
				if body := notice.body(); !strings.Contains(body, "Do not rely on me") || !strings.Contains(body, "ask the operator") {
					t.Errorf("said %q", body)
				}
			}
			w.later(time.Minute)
			if again := w.works(); len(again) > 0 {
				t.Errorf("told again: %v", again)
			}
			w.shows(cryptohook.OwnFine)
			if w.holds() {
				t.Error("holds answers when it is over")
			}
			if told = w.works(); len(told) != 2 || !strings.Contains(told[0].body(), "answering again") {
				t.Errorf("told %v when it was over", told)
			}
			if told = w.works(); len(told) > 0 {
				t.Errorf("told again that it is over: %v", told)
			}
		})
	}
}

func TestSlipOfTheHomeserverIsToldNobody(t *testing.T) {
	w := newWatchedBot(t)
	w.works()
	w.shows(cryptohook.OwnDeviceMissing)
	w.works()
	w.later(time.Second)
	w.works()
	w.shows(cryptohook.OwnFine)
	if w.works(); len(w.told) > 0 || w.holds() {
		t.Errorf("told %v", w.told)
	}
}

func TestRoomsAreToldOnceOverRestarts(t *testing.T) {
	w := newWatchedBot(t)
	w.shows(cryptohook.OwnOtherIdentity)
	w.works()
	w.later(ownConfirm)
	w.works()
	w.start()
	w.shows(cryptohook.OwnOtherIdentity)
	w.works()
	w.later(ownConfirm)
	w.members = append(w.members, "!three:example.org")
	if told := w.works(); len(told) != 1 || told[0].roomID != "!three:example.org" {
		t.Errorf("told %v after a restart", told)
	}
	// What rooms were told of the bot itself is not forgotten after a day, as other warnings are.
	if err := w.records.forget(t.Context(), w.now.Add(48*time.Hour)); err != nil {
		t.Fatal(err)
	}
	w.start()
	w.shown.State = cryptohook.OwnUnknown
	if told := w.works(); len(told) > 0 {
		t.Errorf("told %v before the homeserver has said anything", told)
	}
	w.shows(cryptohook.OwnFine)
	if told := w.works(); len(told) != 3 {
		t.Errorf("told %v when it was over", told)
	}
	// The next time is another one.
	w.later(time.Hour)
	w.shows(cryptohook.OwnDeviceMissing)
	w.works()
	w.later(ownConfirm)
	if told := w.works(); len(told) != 3 {
		t.Errorf("told %v the next time", told)
	}
}

// A crash between sending and noting sends the same message again, which the homeserver recognises.
func TestNoticeAboutTheBotItselfIsRepeatable(t *testing.T) {
	w := newWatchedBot(t)
	w.shows(cryptohook.OwnOtherIdentity)
	w.works()
	w.later(ownConfirm)
	w.works()
	for _, room := range w.members {
		if err := w.records.unsay(t.Context(), doubtOf(room, w.user)); err != nil {
			t.Fatal(err)
		}
	}
	w.later(time.Minute)
	if told := w.works(); len(told) > 0 {
		t.Errorf("told as something new: %v", told)
	}
}

func TestRoomThatCannotBeToldIsToldLater(t *testing.T) {
	w := newWatchedBot(t)
	w.failing = "!one:example.org"
	w.shows(cryptohook.OwnDeviceMissing)
	w.works()
	w.later(ownConfirm)
	if told := w.works(); len(told) != 1 || told[0].roomID != "!two:example.org" {
		t.Errorf("told %v", told)
	}
	w.failing = ""
	if told := w.works(); len(told) != 1 || told[0].roomID != "!one:example.org" {
		t.Errorf("told %v later", told)
	}
}

func TestRoomThatTakesNothingIsLeft(t *testing.T) {
	w := newWatchedBot(t)
	w.refusing = "!one:example.org"
	w.shows(cryptohook.OwnDeviceMissing)
	w.works()
	w.later(ownConfirm)
	w.works()
	w.refusing = ""
	if told := w.works(); len(told) > 0 {
		t.Errorf("told %v", told)
	}
}

func TestMissingSignatureIsMadeAgainOnce(t *testing.T) {
	w := newWatchedBot(t)
	w.onSign = func() { w.shows(cryptohook.OwnFine) }
	w.shows(cryptohook.OwnSignatureMissing)
	w.works()
	w.works()
	if w.signs != 1 || w.holds() || len(w.told) > 0 {
		t.Errorf("signed %d times; told %v", w.signs, w.told)
	}
	// It helps no more.
	w.onSign = nil
	w.shows(cryptohook.OwnSignatureMissing)
	for range 3 {
		w.works()
		w.later(ownConfirm)
	}
	if w.signs != 2 || !w.holds() || len(w.told) != 2 {
		t.Errorf("signed %d times; told %v", w.signs, w.told)
	}
	// Where the server shows no identity at all, a signature of it says nothing.
	w = newWatchedBot(t)
	w.shown.PublishedMasterKey = ""
	w.shows(cryptohook.OwnSignatureMissing)
	if w.works(); w.signs > 0 {
		t.Error("signed for nothing")
	}
}

func TestDoubtIsLoggedEveryHour(t *testing.T) {
	w := newWatchedBot(t)
	w.shows(cryptohook.OwnOtherIdentity)
	for range 121 {
		w.works()
		w.later(time.Minute)
	}
	if w.errorsLogged() != 3 {
		t.Errorf("logged %d errors in two hours", w.errorsLogged())
	}
	for _, words := range []string{"change the account's password", "account.recovery_key", "account.reset_identity"} {
		if !strings.Contains(w.logged.String(), words) {
			t.Errorf("the operator is not told: %s", words)
		}
	}
}

func TestHeldAnswerIsGivenWhenItIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &selfWatch{wake: make(chan struct{}, 1)}
		w.changed(cryptohook.OwnIdentity{State: cryptohook.OwnDeviceMissing})
		var done, held, ok bool
		go func() {
			held, ok = w.hold(t.Context())
			done = true
		}()
		synctest.Wait()
		if done {
			t.Error("was not held")
		}
		w.changed(cryptohook.OwnIdentity{State: cryptohook.OwnOtherIdentity})
		synctest.Wait()
		if done {
			t.Error("was released by another doubt")
		}
		w.changed(cryptohook.OwnIdentity{State: cryptohook.OwnFine})
		synctest.Wait()
		if !done || !held || !ok {
			t.Error("was not released")
		}
		if held, ok = w.hold(t.Context()); held || !ok {
			t.Error("is held when it is over")
		}
	})
}

package soak

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/people"
)

// message is one that bots are to answer.
type message struct {
	eventID id.EventID
	roomID  id.RoomID
	// reader is somebody who can read the answers.
	reader *people.Person
	// code is what is true of it.
	code string
	sent time.Time
}

// ledger is what was sent, for the bots' answers to be held against it.
type ledger struct {
	mu       sync.Mutex
	messages []message
}

func (l *ledger) note(m message) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.messages = append(l.messages, m)
}

func (l *ledger) all() []message {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.messages[:len(l.messages):len(l.messages)]
}

// answersOf gives one bot's answers to a message, as they came so far.
func (m *message) answersOf(bot id.UserID) (answers []people.Answer) {
	for _, answer := range m.reader.Answers(m.eventID) {
		if answer.Sender == bot {
			answers = append(answers, answer)
		}
	}
	return answers
}

// await waits until the bot has answered everything, or the context ends: what has no answer then is lost.
func (l *ledger) await(ctx context.Context, bot id.UserID) {
	for _, m := range l.all() {
		_, err := m.reader.WaitForAnswerThat(ctx, m.eventID, func(answer people.Answer) bool { return answer.Sender == bot })
		if err != nil {
			return
		}
	}
}

// count holds the bot's answers against the ledger. The first few that are not as they should be are told to the test, which does not
// fail by it.
func (l *ledger) count(t *testing.T, bot id.UserID, r *result) {
	t.Helper()
	told := 0
	tell := func(m message, fault string, answers []people.Answer) {
		if told++; told > 10 {
			return
		}
		t.Logf("%s: %s in %s, sent %s: %+v", fault, m.eventID, m.roomID, m.sent.Format(time.TimeOnly), answers)
	}
	for _, m := range l.all() {
		r.messages++
		answers := m.answersOf(bot)
		switch {
		case len(answers) == 0:
			r.lost++
			tell(m, "lost", nil)
		case len(answers) > 1:
			r.doubled++
			tell(m, "doubled", answers)
		case answers[0].Annotation.Code != m.code || answers[0].First != m.code || answers[0].Malformed != nil || !answers[0].Encrypted:
			r.wrong++
			tell(m, fmt.Sprintf("not %q", m.code), answers)
		default:
			r.held++
		}
	}
}

// settle has a last word come in every room after all that the bot had to say before: what it says twice has been said twice by then.
func (l *ledger) settle(ctx context.Context, t *testing.T, bot id.UserID, codeOf func(*people.Person) string) {
	t.Helper()
	last := make(map[id.RoomID]message)
	for _, m := range l.all() {
		last[m.roomID] = m
	}
	for _, m := range last {
		m.sent, m.code = time.Now(), codeOf(m.reader)
		m.eventID = must(m.reader.Send(ctx, m.roomID, say("anything else?")))(t)
		l.note(m)
	}
	l.await(ctx, bot)
}

// check adds the line to the table, and fails the test if it is not as promised.
func check(t *testing.T, r result) {
	t.Helper()
	results.add(r)
	t.Logf("%s, %s: %d tries, %d messages: %d held, %d lost, %d doubled, %d wrong; %d MiB; answers %s ms", r.part, r.what, r.tries, r.messages,
		r.held, r.lost, r.doubled, r.wrong, r.peak>>20, r.answers)
	if !r.asPromised() {
		t.Errorf("%s, %s: not as promised", r.part, r.what)
	}
}

package soak

import (
	"slices"
	"testing"
	"time"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
	"sendertrust/e2e/proxy"
)

// liesKeyWait is encryption.wait of a bot that is lied to: keys that are dropped never come.
const liesKeyWait = 5 * time.Second

// liar is a bot's homeserver that lies to it, and the people who talk there.
type liar struct {
	*proxy.Proxy
	t        *testing.T
	w        *world
	bot      *botproc.Bot
	verified *people.Person
	stranger *people.Person
	// pinned have the code verified, too: lies about a person's keys need a person each.
	pinned chan *people.Person
	// elsewhere is a room of the stranger's with the bot in it, for news that nobody answers.
	elsewhere id.RoomID
}

func newLiar(t *testing.T, w *world, pinned int) *liar {
	t.Helper()
	l := &liar{Proxy: must(proxy.Start(w.server.URL))(t), t: t, w: w, pinned: make(chan *people.Person, pinned)}
	t.Cleanup(l.Close)
	pins := make(botproc.Config)
	newPinned := func() *people.Person {
		person := w.newPerson(t, "pinned")
		pins[person.UserID.String()] = must(person.BootstrapCrossSigning(within(t, patience)))(t).String()
		return person
	}
	l.verified, l.stranger = newPinned(), w.newStranger(t, "stranger")
	for range pinned {
		l.pinned <- newPinned()
	}
	l.bot = w.newBot(t, botOptions{homeserver: l.URL, configure: func(config botproc.Config) {
		config["trust"] = botproc.Config{"verified_users": pins}
		config["encryption"].(botproc.Config)["wait"] = liesKeyWait.String()
	}})
	l.elsewhere = w.newRoom(t, l.stranger, l.bot.UserID)
	ok(t, l.stranger.WaitJoined(within(t, patience), l.elsewhere, l.bot.UserID))
	return l
}

// nudge has /sync bring something to the bot.
func (l *liar) nudge(t *testing.T) {
	t.Helper()
	_, err := l.stranger.Client.SendStateEvent(within(t, patience), l.elsewhere, event.StateTopic, "", map[string]any{"topic": time.Now().String()})
	ok(t, err)
}

// scene is a room in which the homeserver lies while people talk.
type scene struct {
	*liar
	t *testing.T
	// what names the lie, and note says what comes of it.
	what, note string
	ledger     ledger
	// passing are messages whose answers are corrected later, as the lie goes on: what counts is what was said first.
	passing map[id.EventID]bool
	room    id.RoomID
	tries   int
	wrong   int
}

// scene makes a room with the verified person, the stranger, the bot and the guests in it.
func (l *liar) scene(t *testing.T, what, note string, guests ...*people.Person) *scene {
	t.Helper()
	s := &scene{liar: l, t: t, what: what, note: note, passing: make(map[id.EventID]bool)}
	s.room = s.newRoom(guests...)
	return s
}

func (s *scene) newRoom(guests ...*people.Person) id.RoomID {
	s.t.Helper()
	ctx := within(s.t, patience)
	invited := []id.UserID{s.bot.UserID, s.verified.UserID}
	for _, guest := range guests {
		invited = append(invited, guest.UserID)
	}
	room := s.w.newRoom(s.t, s.stranger, invited...)
	everybody := append([]*people.Person{s.verified}, guests...)
	for _, person := range everybody {
		ok(s.t, person.Join(ctx, room))
	}
	for _, person := range append(everybody, s.stranger) {
		for _, member := range append(invited, s.stranger.UserID) {
			ok(s.t, person.WaitJoined(ctx, room, member))
		}
	}
	return room
}

// expect notes a message that the bot is to answer with the code.
func (s *scene) expect(reader *people.Person, eventID id.EventID, code string) message {
	m := message{eventID: eventID, roomID: s.room, reader: reader, code: code, sent: time.Now()}
	s.ledger.note(m)
	return m
}

// says has somebody send a message, with a session of its own if it is to be fresh.
func (s *scene) says(person *people.Person, fresh bool, code string) message {
	s.t.Helper()
	if fresh {
		person.RotateSession(s.room)
	}
	return s.expect(person, must(person.Send(within(s.t, patience), s.room, say("something")))(s.t), code)
}

// forNow notes of messages that their answers may be corrected later.
func (s *scene) forNow(messages ...message) []message {
	for _, m := range messages {
		s.passing[m.eventID] = true
	}
	return messages
}

// hears waits until the bot has answered the messages.
func (s *scene) hears(messages ...message) (answers []people.Answer) {
	s.t.Helper()
	for _, m := range messages {
		answers = append(answers, *must(m.reader.WaitForAnswerThat(within(s.t, patience), m.eventID, s.byBot))(s.t))
	}
	return answers
}

func (s *scene) byBot(answer people.Answer) bool { return answer.Sender == s.bot.UserID }

// honestly has people talk as if nothing were the matter, and waits for the answers.
func (s *scene) honestly() {
	s.t.Helper()
	s.hears(s.says(s.verified, true, "verified"), s.says(s.stranger, true, "unverified_identity"), s.says(s.verified, false, "verified"))
}

// end ends a lie, and notes how often it was told.
func (s *scene) end(told *proxy.Hook) {
	s.tries += told.Used()
	told.Remove()
}

// finish holds the answers against the ledger, and gives the line for the table.
func (s *scene) finish() {
	s.t.Helper()
	s.honestly()
	s.ledger.await(within(s.t, patience), s.bot.UserID)
	r := result{part: "lies", what: s.what, tries: s.tries, note: s.note, wrong: s.wrong}
	var lasting ledger
	for _, m := range s.ledger.all() {
		if !s.passing[m.eventID] {
			lasting.note(m)
			continue
		}
		r.messages++
		switch answers := m.answersOf(s.bot.UserID); {
		case len(answers) == 0:
			r.lost++
		case len(answers) > 1:
			r.doubled++
		case answers[0].First != m.code || answers[0].Malformed != nil || !answers[0].Encrypted:
			s.t.Logf("not %q at first: %+v", m.code, answers[0])
			r.wrong++
		default:
			r.held++
		}
	}
	lasting.count(s.t, s.bot.UserID, &r)
	if s.tries == 0 {
		s.t.Error("the lie was never told")
	}
	check(s.t, r)
}

// object gives what is at a path in a JSON object, and makes what is missing there.
func object(in map[string]any, path ...string) map[string]any {
	for _, key := range path {
		inner, found := in[key].(map[string]any)
		if !found {
			inner = make(map[string]any)
			in[key] = inner
		}
		in = inner
	}
	return in
}

// timelineOf gives the events that a /sync brings of a room; it may bring nothing of it.
func timelineOf(sync map[string]any, room id.RoomID) (events []map[string]any) {
	rooms, _ := sync["rooms"].(map[string]any)
	joined, _ := rooms["join"].(map[string]any)
	ofRoom, _ := joined[room.String()].(map[string]any)
	timeline, _ := ofRoom["timeline"].(map[string]any)
	list, _ := timeline["events"].([]any)
	for _, item := range list {
		if evt, isObject := item.(map[string]any); isObject {
			events = append(events, evt)
		}
	}
	return events
}

func putTimeline(sync map[string]any, room id.RoomID, events []map[string]any) {
	list := make([]any, len(events))
	for i, evt := range events {
		list[i] = evt
	}
	timeline := object(sync, "rooms", "join", room.String(), "timeline")
	timeline["events"] = list
	if timeline["prev_batch"] == nil {
		timeline["prev_batch"], timeline["limited"] = "s0", false
	}
}

// messagesIn tells a lie about the encrypted messages of people in the room: what it returns is what the bot gets instead.
func (s *scene) messagesIn(tell func(sync map[string]any, messages []map[string]any) (instead []map[string]any)) *proxy.Hook {
	s.t.Helper()
	return s.OnAnswer(proxy.Sync, 0, proxy.Edit(func(sync map[string]any) bool {
		var messages, others []map[string]any
		for _, evt := range timelineOf(sync, s.room) {
			if evt["type"] == "m.room.encrypted" && evt["sender"] != s.bot.UserID.String() {
				messages = append(messages, evt)
			} else {
				others = append(others, evt)
			}
		}
		if len(messages) > 0 {
			putTimeline(sync, s.room, append(others, tell(sync, messages)...))
		}
		return len(messages) > 0
	}))
}

// holdUntil keeps messages of the room back until there are so many, and gives them all at once as the lie has them, again and again.
func (s *scene) holdUntil(count int, tell func(all []map[string]any)) *proxy.Hook {
	s.t.Helper()
	var held []map[string]any
	return s.messagesIn(func(_ map[string]any, messages []map[string]any) []map[string]any {
		for _, evt := range messages {
			// A /sync whose answer did not get through brings a message again.
			if !slices.ContainsFunc(held, func(other map[string]any) bool { return other["event_id"] == evt["event_id"] }) {
				held = append(held, evt)
			}
		}
		if len(held) < count {
			return nil
		}
		all := held
		held = nil
		tell(all)
		return all
	})
}

// askAbout has the bot ask for the keys of somebody, whose device list is said to have changed, and waits until the lie was told.
func (s *scene) askAbout(told *proxy.Hook, person *people.Person) {
	s.t.Helper()
	before := told.Used()
	s.OnAnswer(proxy.Sync, 1, proxy.Edit(func(sync map[string]any) bool {
		lists := object(sync, "device_lists")
		changed, _ := lists["changed"].([]any)
		lists["changed"] = append(changed, person.UserID.String())
		return true
	}))
	s.nudge(s.t)
	ok(s.t, told.Wait(within(s.t, patience), before+1))
}

// askedAbout says whether a key query asks about somebody.
func askedAbout(request *proxy.Request, person *people.Person) bool {
	return slices.Contains(usersIn(request), person.UserID)
}

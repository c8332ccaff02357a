package bot

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// ratePeriod is what the limits of answers and edits are counted in.
const ratePeriod = time.Minute

// rate is how often something happens.
type rate struct {
	// times are those within the last minute, the oldest first, as far as they matter.
	times []time.Time
	// exceeded says that it was too often, and has been ever since.
	exceeded bool
}

// exceeds notes that it happens once more, and says whether that is too often: more than so many times in a minute, and then until it is
// no more than half of that.
func (r *rate) exceeds(now time.Time, most int) bool {
	r.times = append(within(r.times, now, ratePeriod), now)
	if len(r.times) > most+1 {
		r.times = slices.Delete(r.times, 0, len(r.times)-most-1)
	}
	if r.exceeded {
		most = max(1, most/2)
	}
	r.exceeded = len(r.times) > most
	return r.exceeded
}

// within drops the times that are longer ago than the period.
func within(times []time.Time, now time.Time, period time.Duration) []time.Time {
	return slices.DeleteFunc(times, func(at time.Time) bool { return now.Sub(at) >= period })
}

// idle says that it has not happened within the last minute.
func (r *rate) idle(now time.Time) bool { return now.Sub(r.times[len(r.times)-1]) >= ratePeriod }

// rateOf gives somebody's rate, for noting that it happens once more.
func rateOf[K comparable](rates map[K]*rate, key K) *rate {
	if rates[key] == nil {
		rates[key] = new(rate)
	}
	return rates[key]
}

// limiter decides which messages are answered when there are very many. Rooms are told when that begins and when it ends. It knows what
// has happened since the process began.
type limiter struct {
	clock              func() time.Time
	perSender, perRoom int

	mu      sync.Mutex
	senders map[id.UserID]*rate
	rooms   map[id.RoomID]*rate
	// warned is when somebody was last warned about in a room in spite of the room's limit.
	warned map[roomSender]time.Time
	// stops are what rooms were told of: that a sender's messages are not answered, or, without a sender, that everybody's are not.
	stops     map[roomSender]*stop
	forgotten time.Time
}

type roomSender struct {
	roomID id.RoomID
	sender id.UserID
}

// stop is a time without answers.
type stop struct {
	begun      time.Time
	unanswered int
}

// stopKept is how long it is remembered that a room was told of a stop, if nobody writes.
const stopKept = 24 * time.Hour

func newLimiter(config *Config, clock func() time.Time) *limiter {
	return &limiter{
		clock: clock, perSender: config.Limits.AnswersPerSender, perRoom: config.Limits.AnswersPerRoom,
		senders: make(map[id.UserID]*rate), rooms: make(map[id.RoomID]*rate),
		warned: make(map[roomSender]time.Time), stops: make(map[roomSender]*stop),
	}
}

// ruling is what a limiter says to one message.
type ruling struct {
	answer bool
	// limit is what keeps the message from being answered.
	limit string
	// stopped is what the room is to be told has stopped, and resumed what has begun again: a sender's messages, or without a sender all.
	stopped, resumed []pause
}

// pause is a time without answers as a room is told of it.
type pause struct {
	sender     id.UserID
	unanswered int
}

// rule decides whether a message is answered. warns says that the answer would be a warning.
func (l *limiter) rule(roomID id.RoomID, sender id.UserID, warns bool) (r ruling) {
	now := l.clock()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.forget(now)
	if rateOf(l.senders, sender).exceeds(now, l.perSender) {
		l.stop(&r, roomID, sender, limitAnswersPerSender, now)
		return r
	}
	// Who may be answered may be told of, whatever the room's limit says.
	l.resume(&r, roomID, sender)
	if !rateOf(l.rooms, roomID).exceeds(now, l.perRoom) {
		l.resume(&r, roomID, "")
		r.answer = true
		return r
	}
	key := roomSender{roomID, sender}
	if last, before := l.warned[key]; warns && (!before || now.Sub(last) >= ratePeriod) {
		l.warned[key] = now
		r.answer = true
		return r
	}
	l.stop(&r, roomID, "", limitAnswersPerRoom, now)
	return r
}

func (l *limiter) stop(r *ruling, roomID id.RoomID, sender id.UserID, limit string, now time.Time) {
	key := roomSender{roomID, sender}
	if l.stops[key] == nil {
		l.stops[key] = &stop{begun: now}
		r.stopped = append(r.stopped, pause{sender: sender})
	}
	l.stops[key].unanswered++
	r.limit = limit
}

func (l *limiter) resume(r *ruling, roomID id.RoomID, sender id.UserID) {
	key := roomSender{roomID, sender}
	if stopped := l.stops[key]; stopped != nil {
		delete(l.stops, key)
		r.resumed = append(r.resumed, pause{sender, stopped.unanswered})
	}
}

// forget drops those who have been silent for a while, now and then.
func (l *limiter) forget(now time.Time) {
	if now.Sub(l.forgotten) < ratePeriod {
		return
	}
	l.forgotten = now
	for sender, r := range l.senders {
		if r.idle(now) {
			delete(l.senders, sender)
		}
	}
	for roomID, r := range l.rooms {
		if r.idle(now) {
			delete(l.rooms, roomID)
		}
	}
	for key, at := range l.warned {
		if now.Sub(at) >= ratePeriod {
			delete(l.warned, key)
		}
	}
	for key, s := range l.stops {
		if now.Sub(s.begun) >= stopKept {
			delete(l.stops, key)
		}
	}
}

// mayAnswer says whether a message is answered now, and tells its room when messages cease to be answered, and when they are again.
func (b *Bot) mayAnswer(ctx context.Context, evt *event.Event, verdict cryptohook.Verdict) bool {
	ruling := b.limiter.rule(evt.RoomID, evt.Sender, b.shield(verdict.Code) != cryptohook.ShieldNone)
	log := zerolog.Ctx(ctx)
	for _, p := range ruling.stopped {
		log.Warn().Str("limit", ruling.limit).Msg("Not answering any more for now: there are more messages than are answered in a minute")
		b.send(ctx, evt.RoomID, noticeContent(b.speech(evt.RoomID).stoppedAnswering(p.sender), nil), hashOf("stopped", evt.ID, p.sender))
	}
	for _, p := range ruling.resumed {
		log.Info().Int("unanswered", p.unanswered).Msg("Answering again")
		b.send(ctx, evt.RoomID, noticeContent(b.speech(evt.RoomID).answeringAgain(p.sender, p.unanswered), nil), hashOf("resumed", evt.ID, p.sender))
	}
	if ruling.answer {
		return true
	}
	// What was answered before a crash, or is about to be, is not forgotten now.
	if told, err := b.reviser.records.get(ctx, evt.ID); err == nil && told != nil {
		return true
	}
	b.metrics.reached(ruling.limit)
	log.Debug().Str("limit", ruling.limit).Str("code", string(verdict.Code)).Msg("Not answering a message")
	return false
}

package cryptohook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime/pprof"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/olm"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Sixty-four goroutines use one Hook at once, by everything that it offers. What each of them does is in crowd_test.go.

const (
	crowdSize = 64
	// ownWorkers are the goroutines of Run: the sync loop, the resolver, the inbox, the key search and the bundles.
	ownWorkers = 5
	crowdPeers = 16
	crowdRooms = 8
	// crowdPatience is when everybody is taken to be stuck.
	crowdPatience = 60 * time.Second
)

// keysOfPeer is how many room keys each of them sends.
func keysOfPeer() int {
	if underRace {
		return 6
	}
	return 10
}

// longestStall is how long an operation may take, less the time in which the process did not get to run: far less than anybody waits who waits
// for somebody else's homeserver.
func longestStall() time.Duration {
	if underRace {
		return 6 * time.Second
	}
	return 2 * time.Second
}

func TestSixtyFourAtOnce(t *testing.T) {
	if onPostgres {
		thePostgres(t) // it outlives this test
	}
	for _, connections := range []int{0, 1} {
		t.Run(fmt.Sprintf("MaxOpenConns %d", connections), func(t *testing.T) {
			stalls := liveAtOnce(t, connections)
			if len(stalls) > 0 && !t.Failed() {
				t.Logf("measured once more, since the machine may have been busy: %v", stalls)
				stalls = liveAtOnce(t, connections)
			}
			for _, stalled := range stalls {
				t.Error(stalled)
			}
		})
	}
}

// liveAtOnce lets the crowd live, sees that nothing is lost or wrong after it, and gives what has stalled.
func liveAtOnce(t *testing.T, connections int) (stalls []string) {
	t.Helper()
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	c := newCrowd(t, connections)
	defer c.close()
	c.live()
	c.settle()
	c.check()
	return c.watch.stalls()
}

// crowd is a hook at work, those who write to it, and those who use it.
type crowd struct {
	t   *testing.T
	ctx context.Context
	*story
	*receiver
	network *crowdNetwork
	watch   *stallWatch

	size atomic.Int64
	// ended is set when everything that was told was handled.
	ended atomic.Bool
	all   chan struct{}
	// midway is closed when some of it was.
	midway chan struct{}
	// exports are sessions that somebody has, and that their owners are about to share.
	exports chan *crypto.ExportedSession
	// seen are the events that a handler has seen.
	seen chan *toldEvent

	mu       sync.Mutex
	wanted   []*crowdKey
	imported []id.SessionID
	shared   map[id.SessionID]struct{}
	events   map[id.EventID]*toldEvent
	handled  int
	// stale are the events whose verdicts may have changed since they were told, for each reviewer.
	stale [reviewers]map[id.EventID]struct{}
	wake  [reviewers]chan struct{}

	sent, arrived atomic.Int64
}

// crowdKey is a room key that was sent.
type crowdKey struct {
	wantedKey
	from *peer
}

// toldEvent is a room event, and what was told of it last.
type toldEvent struct {
	eventID id.EventID
	roomID  id.RoomID
	from    *peer
	session id.SessionID
	body    string
	raw     object
	// seen counts how often a handler saw it.
	seen    int
	verdict Verdict
}

func newCrowd(t *testing.T, connections int) *crowd {
	t.Helper()
	c := &crowd{
		t: t, ctx: t.Context(), watch: newStallWatch(), all: make(chan struct{}), midway: make(chan struct{}), exports: make(chan *crypto.ExportedSession, crowdPeers),
		seen:   make(chan *toldEvent, 2*crowdPeers*keysOfPeer()),
		shared: make(map[id.SessionID]struct{}), events: make(map[id.EventID]*toldEvent),
	}
	for i := range reviewers {
		c.stale[i], c.wake[i] = make(map[id.EventID]struct{}), make(chan struct{}, 1)
	}
	c.story = newStory(t, newDatabase(t), crowdPeers)
	// Everybody has an Olm session with the receiver, and keys that are worked out at first use are worked out.
	c.tell(c.peers...)
	c.story.receiver.Keys()
	c.network = &crowdNetwork{network: c.story.network(), deliveries: make(chan delivery, crowdPeers)}
	c.network.people = &keyServer{actors: make(map[id.UserID]*actor), requests: make(map[string]int)}
	c.network.people.add(c.bot)
	for _, p := range c.peers {
		c.network.people.add(p.owner)
	}
	c.receiver = c.openWith(t, safeDriver, c.seed, connections, c.network.network)
	if err := c.feed(c.ctx, c.receiver); err != nil {
		t.Fatal(err)
	}
	if err := c.handleAll(c.ctx); err != nil {
		t.Fatal(err)
	}
	for room := range crowdRooms {
		roomID := crowdRoom(room)
		err := c.client.StateStore.SetEncryptionEvent(c.ctx, roomID, &event.EncryptionEventContent{Algorithm: id.AlgorithmMegolmV1})
		for i := range 3 {
			member := c.peers[(room+5*i)%crowdPeers].owner.userID
			err = errors.Join(err, c.client.StateStore.SetMembership(c.ctx, roomID, member, event.MembershipJoin))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	c.transport.base, c.client.Syncer = c.network, &watchedSyncer{c.syncer, c.watch}
	c.options.OnChange = c.noteChange
	c.options.Owner = c.owner // so that Run does not release it
	readers := must(c.readers(c.ctx))
	c.network.onSent = func(body []byte) {
		texts, err := read(c.ctx, readers, body)
		if err != nil {
			t.Error(err)
		}
		c.arrived.Add(int64(len(texts)))
	}
	c.uow.fault = c.wholeMessagesOnly
	c.syncer.OnEventType(event.EventMessage, c.noteEvent)
	c.syncer.OnEventType(event.EventEncrypted, c.noteEvent)
	return c
}

func crowdRoom(n int) id.RoomID { return id.RoomID(fmt.Sprintf("!crowd%d:test", n%crowdRooms)) }

// wholeMessagesOnly sees after every commit that no message's hash is durable without the room key that was in it, or the other way
// round: redelivery after a crash would find a repetition.
func (c *crowd) wholeMessagesOnly(at string) error {
	if at != "committed" {
		return nil
	}
	halves := c.count(`
		SELECT (SELECT COUNT(*) FROM crypto_olm_message_hash) - (SELECT COUNT(*) FROM sendertrust_session WHERE source='direct' AND sender<>$1)
	`, receiverUser)
	if halves != 0 {
		c.t.Errorf("a commit has cut %d messages in two", halves)
	}
	return nil
}

// live has everybody work until all that was told is handled.
func (c *crowd) live() {
	c.t.Helper()
	ctx, stop := context.WithCancel(c.ctx)
	defer stop()
	var everybody, producing, background sync.WaitGroup
	background.Go(func() { c.watch.run(ctx) })
	background.Go(func() {
		if err := c.Run(ctx); err != nil {
			c.t.Error(err)
		}
	})
	c.size.Store(ownWorkers)
	hire := func(group *sync.WaitGroup, count int, work func(n int)) {
		for n := range count {
			c.size.Add(1)
			group.Go(func() { work(n) })
		}
	}
	hire(&producing, crowdPeers, c.produce)
	hire(&everybody, 8, c.encrypt)
	hire(&everybody, 6, c.write)
	hire(&everybody, 6, c.query)
	hire(&everybody, reviewers, c.review)
	hire(&everybody, 5, c.judgeAgain)
	hire(&everybody, 4, c.importKeys)
	hire(&everybody, 3, c.decide)
	hire(&everybody, 2, c.publish)
	hire(&everybody, 1, c.read)
	if c.size.Load() != crowdSize {
		c.t.Errorf("%d goroutines are at work, want %d", c.size.Load(), crowdSize)
	}
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		producing.Wait()
		close(c.exports)
		c.produced()
		<-c.all
		close(c.seen)
		c.ended.Store(true)
		for i := range c.wake {
			notify(c.wake[i])
		}
		everybody.Wait()
		stop()
		background.Wait()
	}()
	select {
	case <-finished:
	case <-time.After(crowdPatience):
		var stacks bytes.Buffer
		_ = pprof.Lookup("goroutine").WriteTo(&stacks, 2)
		c.t.Fatalf("stalled: %s\n%s", c.watch, stacks.Bytes())
	}
}

// settle does what Run would have done next, without anybody asking for it.
func (c *crowd) settle() {
	c.t.Helper()
	for worked := true; worked; {
		var err error
		if worked, err = c.resolver.pass(c.ctx); err != nil {
			c.t.Fatal(err)
		}
	}
	if err := c.handleAll(c.ctx); err != nil {
		c.t.Fatal(err)
	}
	for n := range reviewers {
		if err := c.reviewStale(n); err != nil {
			c.t.Fatal(err)
		}
	}
}

func (c *crowd) check() {
	c.t.Helper()
	for _, key := range c.wanted {
		key.State, _ = key.from.state()
		if err := key.check(c.ctx, c.receiver); err != nil {
			c.t.Error(err)
		}
	}
	for _, evt := range c.events {
		if _, code := evt.from.state(); evt.seen == 0 || evt.verdict.Code != code {
			c.t.Errorf("%s of %s was seen %d times, last told as %s (%s), want %s", evt.eventID, evt.from.owner.userID, evt.seen, evt.verdict.Code, evt.verdict.Reason, code)
		}
	}
	for _, sessionID := range c.imported {
		c.wantClaim(sessionID, StateUnknownDevice, SourceImport)
	}
	for sessionID := range c.shared {
		c.wantClaim(sessionID, StateSenderVerified, SourceDirect)
	}
	if sent, arrived := c.sent.Load(), c.arrived.Load(); arrived < sent {
		c.t.Errorf("%d messages of %d have arrived", arrived, sent)
	}
	c.t.Logf("%d room keys, %d room events, %d imports, %d sessions shared, %d Olm messages read", len(c.wanted), len(c.events), len(c.imported), len(c.shared), c.arrived.Load())
	c.t.Log(c.watch)
}

func (c *crowd) wantClaim(sessionID id.SessionID, state State, source Source) {
	c.t.Helper()
	claims := must(c.store.claims(c.ctx, sessionID))
	holder := must(c.store.holder(c.ctx, c.uow.AccountID, sessionID))
	if len(claims) != 1 || claims[0].State != state || claims[0].Source != source || holder == nil {
		c.t.Errorf("session %s is held by %+v with claims %s, want one %s that is %s", sessionID, holder, rawJSON(claims), source, state)
	}
}

// noteEvent is the handler of room events.
func (c *crowd) noteEvent(_ context.Context, evt *event.Event) {
	verdict, _ := VerdictOf(evt)
	c.mu.Lock()
	defer c.mu.Unlock()
	told := c.events[evt.ID]
	if told == nil {
		c.t.Errorf("a handler saw %s, which nobody has sent", evt.ID)
		return
	}
	if message, ok := evt.Content.Parsed.(*event.MessageEventContent); !ok || message.Body != told.body {
		c.t.Errorf("a handler saw %s as %s (%s), without its text", evt.ID, verdict.Code, verdict.Reason)
	}
	if codes := told.from.mayBe(); !slices.Contains(codes, verdict.Code) {
		c.t.Errorf("%s of %s is %s, want one of %s", evt.ID, told.from.owner.userID, verdict.Code, codes)
	}
	if told.seen++; told.seen == 1 {
		c.seen <- told
		if c.handled++; c.handled == crowdPeers*keysOfPeer()/2 {
			close(c.midway)
		}
	}
	// What was learnt while the handler was on its way was told before this event was known to whom it is told.
	told.verdict = verdict
	c.markStale(told)
	c.finishLocked()
}

// produced says that nobody sends anything any more.
func (c *crowd) produced() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watch.producing.Store(false)
	c.finishLocked()
}

func (c *crowd) finishLocked() {
	if !c.watch.producing.Load() && c.handled == len(c.events) {
		select {
		case <-c.all:
		default:
			close(c.all)
		}
	}
}

// noteChange is told by the hook what may have changed the verdicts.
func (c *crowd) noteChange(change Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, evt := range c.events {
		if evt.seen > 0 && (slices.Contains(change.Users, evt.from.owner.userID) || slices.Contains(change.Sessions, evt.session)) {
			c.markStale(evt)
		}
	}
}

func (c *crowd) markStale(evt *toldEvent) {
	shard := reviewerOf(evt.eventID)
	c.stale[shard][evt.eventID] = struct{}{}
	notify(c.wake[shard])
}

// newKey makes a session of a peer, and notes that it has to arrive.
func (c *crowd) newKey(p *peer, roomID id.RoomID) *megolm {
	session := newMegolm(roomID)
	exported := must(must(olm.NewInboundGroupSession([]byte(session.key))).Export(0))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wanted = append(c.wanted, &crowdKey{wantedKey{RoomID: roomID, SessionID: session.id(), SenderKey: p.senderKey(), Export: string(exported)}, p})
	return session
}

// newMessage makes a room event of a peer, and notes that it has to be handled.
func (c *crowd) newMessage(p *peer, session *megolm) delivery {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(c.events)
	evt := &toldEvent{eventID: id.EventID(fmt.Sprintf("$crowd%d", n)), roomID: session.roomID, from: p, session: session.id(), body: fmt.Sprintf("text %d", n)}
	evt.raw = object{
		"type": "m.room.encrypted", "event_id": evt.eventID.String(), "sender": p.owner.userID.String(),
		"origin_server_ts": 1_700_000_000_000 + n, "content": session.message(evt.body),
	}
	c.events[evt.eventID] = evt
	return delivery{roomID: session.roomID, timeline: evt.raw}
}

// asStoredEvent is the event as the inbox has it.
func (e *toldEvent) asStoredEvent(now time.Time) *inboxEvent {
	return &inboxEvent{eventID: e.eventID, roomID: e.roomID, roomEncrypted: true, receivedAt: now, event: string(must(json.Marshal(e.raw)))}
}

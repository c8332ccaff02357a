package cryptohook

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"hash/fnv"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// Those who use a Hook at once: see races_test.go. Each does its share.

const (
	reviewers = 8
	// deliveriesPerSync bounds what one /sync brings.
	deliveriesPerSync = 10
)

// delivery is what the server has for the receiver.
type delivery struct {
	toDevice object
	roomID   id.RoomID
	timeline object
	changed  id.UserID
}

// crowdNetwork answers /sync with what was delivered, as soon as there is something.
type crowdNetwork struct {
	*network
	deliveries chan delivery
	syncs      int
}

func (n *crowdNetwork) RoundTrip(req *http.Request) (*http.Response, error) {
	if !strings.HasSuffix(req.URL.Path, "/sync") {
		return n.network.RoundTrip(req)
	}
	var batch []delivery
	select {
	case <-req.Context().Done():
		return nil, req.Context().Err()
	case first := <-n.deliveries:
		batch = append(batch, first)
	}
	for len(batch) < deliveriesPerSync && len(n.deliveries) > 0 {
		batch = append(batch, <-n.deliveries)
	}
	return &http.Response{
		StatusCode: http.StatusOK, Request: req, Header: http.Header{"Content-Type": {"application/json"}},
		Body: io.NopCloser(bytes.NewReader(n.sync(batch))),
	}, nil
}

// sync makes the /sync answer. Every third one has the receiver make one-time keys.
func (n *crowdNetwork) sync(batch []delivery) []byte {
	n.syncs++
	keys := 50
	if n.syncs%3 == 0 {
		keys = 49
	}
	var toDevice []object
	var changed []id.UserID
	timelines := make(map[id.RoomID][]object)
	for _, d := range batch {
		if d.toDevice != nil {
			toDevice = append(toDevice, d.toDevice)
		}
		if d.timeline != nil {
			timelines[d.roomID] = append(timelines[d.roomID], d.timeline)
		}
		if d.changed != "" {
			changed = append(changed, d.changed)
		}
	}
	joined := object{}
	for roomID, timeline := range timelines {
		joined[roomID.String()] = object{"timeline": object{"events": timeline}}
	}
	return rawJSON(object{
		"next_batch": fmt.Sprintf("c%d", n.syncs), "device_one_time_keys_count": object{"signed_curve25519": keys},
		"to_device": object{"events": toDevice}, "device_lists": object{"changed": changed}, "rooms": object{"join": joined},
	})
}

// watchedSyncer measures how long each /sync takes.
type watchedSyncer struct {
	*syncer
	watch *stallWatch
}

func (s *watchedSyncer) ProcessResponse(ctx context.Context, resp *mautrix.RespSync, since string) error {
	return s.watch.do("process a /sync", func() error { return s.syncer.ProcessResponse(ctx, resp, since) })
}

// work does an operation so many times.
func (c *crowd) work(name string, share int, do func(n int) error) {
	for n := range share {
		if err := c.watch.do(name, func() error { return do(n) }); err != nil {
			c.t.Errorf("%s: %v", name, err)
			return
		}
	}
}

// What the people are like, by their number.

func (p *peer) number() (n int) {
	must(fmt.Sscanf(p.deviceID.String(), "PEER%d", &n))
	return n
}

// isDecidedOn: the receiver's owner verifies this user, and withdraws it, again and again.
func (p *peer) isDecidedOn() bool { return p.number()%4 == 1 }

// isRotating: the user replaces the self-signing key again and again.
func (p *peer) isRotating() bool { return p.number()%8 == 4 }

// isAppearing: the user makes a cross-signing identity at some time.
func (p *peer) isAppearing() bool { return p.number()%8 == 7 }

// isVouched: another device of the receiver's owner verifies this user at some time.
func (p *peer) isVouched() bool { return p.number()%8 == 0 }

// mayBe are the codes that a message of the peer may have at any time.
func (p *peer) mayBe() []Code {
	switch {
	case p.isDecidedOn(), p.isVouched():
		return []Code{CodeUnverifiedIdentity, CodeVerified}
	case p.isRotating(), p.isAppearing():
		return []Code{CodeUnverifiedIdentity, CodeUnsignedDevice}
	case p.number()%4 == 2:
		return []Code{CodeVerified}
	case p.number()%4 == 3:
		return []Code{CodeUnsignedDevice}
	default:
		return []Code{CodeUnverifiedIdentity}
	}
}

func (c *crowd) ofKind(is func(p *peer) bool) (some []*peer) {
	for _, p := range c.peers {
		if is(p) {
			some = append(some, p)
		}
	}
	return some
}

// produce sends room keys and messages of one peer: together, the message first, or somebody else's copy of the key first.
func (c *crowd) produce(n int) {
	p := c.peers[n]
	shareKey := func(session *megolm) delivery {
		// Its identity may be changing.
		c.network.people.mu.Lock()
		defer c.network.people.mu.Unlock()
		return delivery{toDevice: c.story.encrypt(p, "m.room_key", session.roomKey())}
	}
	for i := range keysOfPeer() {
		session := c.newKey(p, crowdRoom(n+i))
		if i%4 == 1 {
			c.network.deliveries <- c.newMessage(p, session)
		}
		if i%4 == 2 {
			c.exports <- exported(c.t, session, p.actorDevice)
		}
		c.network.deliveries <- shareKey(session)
		c.network.deliveries <- c.newMessage(p, session)
		if i%4 == 3 {
			c.network.deliveries <- c.newMessage(p, session)
		}
	}
}

// encrypt writes to a room, whose session is shared anew now and then.
func (c *crowd) encrypt(room int) {
	roomID := crowdRoom(room)
	c.work("encrypt for a room", 20, func(n int) error {
		if n%4 == 3 {
			if err := c.uow.RemoveOutboundGroupSession(c.ctx, roomID); err != nil {
				return err
			}
		}
		encrypted, err := c.Encrypt(c.ctx, roomID, event.EventMessage, &event.MessageEventContent{MsgType: event.MsgText, Body: "hi"})
		if err != nil {
			return err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.shared[encrypted.SessionID] = struct{}{}
		return nil
	})
}

// write writes to one device after the other.
func (c *crowd) write(first int) {
	c.work("write to a device", 40, func(n int) error {
		c.sent.Add(1)
		return c.send(c.ctx, c.peers[(first+n)%crowdPeers].device(), "a message")
	})
}

// query asks for people's keys, whether or not that is needed.
func (c *crowd) query(first int) {
	c.work("query keys", 20, func(n int) error {
		users := []id.UserID{c.peers[(first+n)%crowdPeers].owner.userID, c.peers[(first+7*n+3)%crowdPeers].owner.userID}
		if n%5 == 4 {
			c.resolver.ask(users...)
			return nil
		}
		_, err := c.mach.FetchKeys(c.ctx, users, true)
		return err
	})
}

func reviewerOf(eventID id.EventID) int {
	hash := fnv.New32a()
	_, _ = hash.Write([]byte(eventID))
	return int(hash.Sum32() % reviewers)
}

// review looks again at the verdicts that may have changed, as the bot does with its answers.
func (c *crowd) review(n int) {
	for !c.ended.Load() {
		<-c.wake[n]
		if err := c.watch.do("review verdicts", func() error { return c.reviewStale(n) }); err != nil {
			c.t.Error(err)
		}
	}
}

func (c *crowd) reviewStale(n int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.stale[n]) > 0 {
		var evt *toldEvent
		for eventID := range c.stale[n] {
			evt = c.events[eventID]
		}
		delete(c.stale[n], evt.eventID)
		told, sender := evt.verdict, evt.from.owner.userID
		c.mu.Unlock()
		now, err := c.Review(c.ctx, told, sender)
		c.mu.Lock()
		if err != nil {
			return err
		}
		evt.verdict = now
	}
	return nil
}

// judgeAgain judges events that were handled, and reads them.
func (c *crowd) judgeAgain(int) {
	for told := range c.seen {
		c.work("judge an event", 3, func(int) error {
			stored := told.asStoredEvent(time.Now().Add(-time.Hour))
			judged, verdict, wait, err := c.judge(c.ctx, stored, must(stored.parse(stored.event)))
			if err != nil || wait > 0 {
				return fmt.Errorf("%s has to wait %v: %w", told.eventID, wait, err)
			}
			if codes := told.from.mayBe(); !slices.Contains(codes, verdict.Code) {
				return fmt.Errorf("%s of %s is %s, want one of %s", told.eventID, told.from.owner.userID, verdict.Code, codes)
			}
			if message, ok := judged.Content.Parsed.(*event.MessageEventContent); !ok || message.Body != told.body {
				return fmt.Errorf("%s was read as %v", told.eventID, judged.Content.Raw)
			}
			return nil
		})
	}
}

// importKeys imports key exports: of sessions that are about to be shared, and of others.
func (c *crowd) importKeys(first int) {
	for about := range c.exports {
		c.work("import keys", 1, func(int) error {
			sessions := []*crypto.ExportedSession{about}
			for i := range 3 {
				session := newMegolm(crowdRoom(first + i))
				sessions = append(sessions, exported(c.t, session, c.peers[(first+i)%crowdPeers].actorDevice))
				c.mu.Lock()
				c.imported = append(c.imported, session.id())
				c.mu.Unlock()
			}
			result, err := c.ImportKeys(c.ctx, testPassphrase, exportFile(c.t, 1, rawJSON(sessions)))
			if err == nil && (result.Total != len(sessions) || result.Imported+result.Known != len(sessions)) {
				err = fmt.Errorf("the result is %+v", result)
			}
			return err
		})
	}
}

// decide verifies a user and withdraws that, each time for good.
func (c *crowd) decide(n int) {
	p := c.ofKind((*peer).isDecidedOn)[n]
	setVerifiedBy := func(bot *actor) {
		c.network.people.mu.Lock()
		defer c.network.people.mu.Unlock()
		p.owner.verifiedBy = bot
	}
	c.work("decide on a user", 12+n, func(n int) error {
		if n%2 == 1 {
			// The server shows the signature on; it does not count. For the test it is gone.
			setVerifiedBy(nil)
			return c.WithdrawVerification(c.ctx, p.owner.userID)
		}
		if err := c.Verify(c.ctx, p.owner.userID, p.owner.masterKey()); err != nil {
			return err
		}
		setVerifiedBy(c.bot)
		return nil
	})
}

// publish has a user replace the self-signing key, another one make an identity, and a third one verified elsewhere; the server announces
// all of it.
func (c *crowd) publish(n int) {
	rotating, appearing, vouched := c.ofKind((*peer).isRotating)[n], c.ofKind((*peer).isAppearing)[n], c.ofKind((*peer).isVouched)[n]
	publish := func(by *peer, change func()) error {
		c.network.people.mu.Lock()
		change()
		c.network.people.mu.Unlock()
		_, err := c.mach.FetchKeys(c.ctx, []id.UserID{by.owner.userID}, true)
		select {
		case c.network.deliveries <- delivery{changed: by.owner.userID}:
		default:
		}
		return err
	}
	c.work("publish keys", 10, func(int) error {
		return publish(rotating, func() { rotating.owner.selfSigning = newActor("").selfSigning })
	})
	// Some of their messages are to be told of before.
	<-c.midway
	c.work("publish keys", 1, func(int) error {
		return publish(appearing, func() { appearing.owner.hidden, appearing.crossSigned = false, true })
	})
	c.work("publish keys", 1, func(int) error {
		return publish(vouched, func() { vouched.owner.verifiedBy = c.bot })
	})
}

// read reads everything that is stored, and wants sessions that do not exist.
func (c *crowd) read(int) {
	c.work("read all sessions", 20, func(n int) error {
		unknown := make([]byte, 32)
		_, _ = rand.Read(unknown)
		c.search.want(crowdRoom(n), "@peer0:test", id.SessionID(base64.RawStdEncoding.EncodeToString(unknown)), false)
		sessions, err := c.uow.GetAllGroupSessions(c.ctx).AsList()
		if err != nil {
			return err
		}
		for i := range sessions {
			if i%20 == n%20 {
				if _, err = sessions[i].Internal.Export(sessions[i].Internal.FirstKnownIndex()); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

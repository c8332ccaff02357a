package people

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

const (
	// syncPoll is how long the homeserver may hold a /sync open.
	syncPoll = 20 * time.Second
	// syncRetry is the pause after a /sync that failed.
	syncRetry = 300 * time.Millisecond
	// timelineLimit is more than a test lets happen between two syncs. A gap would hide answers, so one ends the syncing.
	timelineLimit = 100
)

// seen is what the syncs have shown so far.
type seen struct {
	// changed is closed, and replaced, after each sync.
	changed chan struct{}
	// syncs counts the answers of /sync that were processed.
	syncs int
	// err is why the syncing ended.
	err error

	joined  map[id.RoomID]map[id.UserID]bool
	events  map[id.EventID]bool
	invites map[id.RoomID]bool
	answers map[id.EventID][]*Answer // by the event that they answer
	answer  map[id.EventID]*Answer   // by their own ID
	notices []Notice
	// verification are the events of verifications, in rooms and to this device.
	verification []*event.Event
	// undecrypted are events whose key has not come yet.
	undecrypted []*event.Event
}

func newSeen() seen {
	return seen{
		changed: make(chan struct{}), joined: make(map[id.RoomID]map[id.UserID]bool), events: make(map[id.EventID]bool),
		invites: make(map[id.RoomID]bool), answers: make(map[id.EventID][]*Answer), answer: make(map[id.EventID]*Answer),
	}
}

// start begins the goroutine that syncs; it outlives the context of the login, but not [Person.Close].
func (p *Person) start(ctx context.Context, keepOneTimeKeys bool) {
	ctx, p.stop = context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		defer close(p.stopped)
		err := p.sync(ctx, keepOneTimeKeys)
		p.note(func(s *seen) { s.err = err })
	}()
}

// sync polls until the context ends or the homeserver refuses the token; it always returns an error.
func (p *Person) sync(ctx context.Context, keepOneTimeKeys bool) error {
	filter, err := p.Client.CreateFilter(ctx, &mautrix.Filter{
		Presence: &mautrix.FilterPart{NotTypes: []event.Type{{Type: "*"}}},
		Room: &mautrix.RoomFilter{
			Ephemeral: &mautrix.FilterPart{NotTypes: []event.Type{{Type: "*"}}},
			Timeline:  &mautrix.FilterPart{Limit: timelineLimit},
		},
	})
	if err != nil {
		return fmt.Errorf("failed to create the filter: %w", err)
	}
	since := ""
	for {
		timeout := syncPoll
		if since == "" {
			timeout = 0
		}
		resp, err := p.Client.FullSyncRequest(ctx, mautrix.ReqSync{
			Timeout: int(timeout.Milliseconds()), Since: since, FilterID: filter.FilterID, SetPresence: event.PresenceOffline,
		})
		switch {
		case ctx.Err() != nil:
			return ErrClosed
		case errors.Is(err, mautrix.MUnknownToken):
			return fmt.Errorf("the device of %s was logged out: %w", p.UserID, err)
		case err != nil:
			select {
			case <-ctx.Done():
			case <-time.After(syncRetry):
			}
			continue
		}
		if err = p.process(ctx, resp, since, keepOneTimeKeys); err != nil {
			return err
		}
		since = resp.NextBatch
	}
}

// process takes in one answer of /sync: keys first, then rooms, then the events in them.
func (p *Person) process(ctx context.Context, resp *mautrix.RespSync, since string, keepOneTimeKeys bool) error {
	var timeline []*event.Event
	var gap id.RoomID
	joined := make(map[id.RoomID]map[id.UserID]bool)
	for roomID, room := range resp.Rooms.Join {
		if room.Timeline.Limited && since != "" && p.knowsRoom(roomID) {
			gap = roomID
		}
		joined[roomID] = make(map[id.UserID]bool)
		for _, evt := range append(room.State.Events, room.Timeline.Events...) {
			prepare(evt, roomID)
			p.Client.StateStoreSyncHandler(ctx, evt)
			if evt.Type == event.StateMember {
				joined[roomID][id.UserID(evt.GetStateKey())] = evt.Content.AsMember().Membership == event.MembershipJoin
			}
		}
		timeline = append(timeline, room.Timeline.Events...)
	}
	p.receiveKeys(ctx, resp, since, keepOneTimeKeys)
	read, unread := p.read(ctx, append(p.unread(), timeline...))
	p.note(func(s *seen) {
		s.syncs++
		s.undecrypted = unread
		for roomID, members := range joined {
			if s.joined[roomID] == nil {
				s.joined[roomID] = make(map[id.UserID]bool)
			}
			maps.Copy(s.joined[roomID], members)
			delete(s.invites, roomID)
		}
		for roomID := range resp.Rooms.Invite {
			s.invites[roomID] = true
		}
		for roomID := range resp.Rooms.Leave {
			delete(s.joined, roomID)
			delete(s.invites, roomID)
		}
		for _, evt := range timeline {
			s.events[evt.ID] = true
		}
		s.takeVerification(append(resp.ToDevice.Events, read...))
		for _, evt := range read {
			s.takeAnswer(evt, p.UserID)
		}
	})
	if gap != "" {
		return fmt.Errorf("more than %d events came at once in %s: answers may have been missed", timelineLimit, gap)
	}
	return nil
}

func prepare(evt *event.Event, roomID id.RoomID) {
	evt.RoomID = roomID
	evt.Type.Class = event.MessageEventType
	if evt.StateKey != nil {
		evt.Type.Class = event.StateEventType
	}
	// Events that cannot be parsed are others' junk; those that matter here are looked at again below.
	_ = evt.Content.ParseRaw(evt.Type)
}

// receiveKeys lets the machine take in the to-device events. Requests for keys are left alone, since a person decides by hand
// who gets one; so are changes of device lists, since the devices are asked for whenever a key is shared.
func (p *Person) receiveKeys(ctx context.Context, resp *mautrix.RespSync, since string, keepOneTimeKeys bool) {
	keys := &mautrix.RespSync{DeviceOTKCount: resp.DeviceOTKCount}
	for _, evt := range resp.ToDevice.Events {
		if evt.Type.Type == event.ToDeviceEncrypted.Type || evt.Type.Type == event.ToDeviceRoomKeyWithheld.Type {
			keys.ToDevice.Events = append(keys.ToDevice.Events, evt)
		}
	}
	if !keepOneTimeKeys {
		keys.DeviceOTKCount.SignedCurve25519 = int(p.machine.GetAccount().Internal.MaxNumberOfOneTimeKeys())
	}
	p.machineLock.Lock()
	defer p.machineLock.Unlock()
	p.machine.ProcessSyncResponse(ctx, keys, since)
}

// read decrypts the events of others; those whose key may yet come are given back as unread.
func (p *Person) read(ctx context.Context, events []*event.Event) (read, unread []*event.Event) {
	p.machineLock.Lock()
	defer p.machineLock.Unlock()
	for _, evt := range events {
		switch {
		case evt.Sender == p.UserID:
		case evt.Type == event.EventMessage:
			read = append(read, evt)
		case evt.Type == event.EventEncrypted:
			decrypted, err := p.decrypt(ctx, evt)
			if errors.Is(err, crypto.ErrNoSessionFound) {
				unread = append(unread, evt)
			} else if err == nil {
				read = append(read, decrypted)
			}
		}
	}
	return read, unread
}

// decrypt decrypts a room event. mautrix 0.31 panics when the plaintext is "null"; a person who reads junk is not to end the test.
func (p *Person) decrypt(ctx context.Context, evt *event.Event) (decrypted *event.Event, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("mautrix panicked: %v", r)
		}
	}()
	return p.machine.DecryptMegolmEvent(ctx, evt)
}

func (p *Person) unread() []*event.Event {
	p.seenLock.Lock()
	defer p.seenLock.Unlock()
	return p.seen.undecrypted
}

func (p *Person) knowsRoom(roomID id.RoomID) bool {
	p.seenLock.Lock()
	defer p.seenLock.Unlock()
	return p.seen.joined[roomID] != nil
}

// note changes what was seen and wakes everybody who waits.
func (p *Person) note(change func(*seen)) {
	p.seenLock.Lock()
	defer p.seenLock.Unlock()
	change(&p.seen)
	close(p.seen.changed)
	p.seen.changed = make(chan struct{})
}

// wait blocks until the condition holds for what was seen. What names the thing that is waited for.
func (p *Person) wait(ctx context.Context, what string, holds func(*seen) bool) error {
	for {
		p.seenLock.Lock()
		done, changed, ended := holds(&p.seen), p.seen.changed, p.seen.err
		p.seenLock.Unlock()
		switch {
		case done:
			return nil
		case ended != nil:
			return fmt.Errorf("%s waited for %s: %w", p.UserID, what, ended)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%s waited for %s: %w", p.UserID, what, context.Cause(ctx))
		}
	}
}

// WaitForEvent waits until the event has come down in a /sync, whether or not it can be read.
func (p *Person) WaitForEvent(ctx context.Context, eventID id.EventID) error {
	return p.wait(ctx, fmt.Sprintf("event %s", eventID), func(s *seen) bool { return s.events[eventID] })
}

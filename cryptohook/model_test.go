package cryptohook

import "slices"

// model keeps the whole history that the bot has seen, and judges by walking all of it from the beginning, every time. It knows
// nothing of how the hook stores or caches anything.
type model struct {
	past []happening
	pins map[int]int
	// last is what the reader of all that happened came to, as long as nothing else happens.
	last     *reader
	lastRead int
}

// happening is one thing that the bot came to know, or that its operator did.
type happening struct {
	observed *observation
	received *reception
	decided  *decision
}

// observation is what a /keys/query answer said of one user.
type observation struct {
	user                        int
	living                      map[int]copyOf
	identity                    keyIndex
	hasIdentity, hasSelfSigning bool
	vouched                     bool
}

type modelDevice struct{ user, device int }

// reception is a room key.
type reception struct {
	session  int
	from     modelDevice
	isDirect bool
	embedded *copyOf
}

// decision is a verification or its withdrawal, or a change of the pins.
type decision struct {
	user     int
	verifies bool
	master   int
	pins     map[int]int // of a restart
	isStart  bool
	signsPin bool
}

func newModel() *model { return &model{pins: make(map[int]int)} }

func (m *model) observe(o observation) { m.past = append(m.past, happening{observed: &o}) }

func (m *model) direct(session int, from modelDevice, embedded *copyOf) {
	m.past = append(m.past, happening{received: &reception{session, from, true, embedded}})
}

func (m *model) imported(session int, from modelDevice) {
	m.past = append(m.past, happening{received: &reception{session: session, from: from}})
}

func (m *model) verify(user, master int, pinned bool) (done bool) {
	known := m.read().users[user]
	if pinned || !known.hasIdentity || known.identity.master != master {
		return false
	}
	m.past = append(m.past, happening{decided: &decision{user: user, verifies: true, master: master}})
	return true
}

func (m *model) withdraw(user int, pinned bool) (done bool) {
	if pinned || !m.read().users[user].hasIdentity {
		return false
	}
	m.past = append(m.past, happening{decided: &decision{user: user}})
	return true
}

func (m *model) restart(pins map[int]int) {
	m.pins = pins
	m.past = append(m.past, happening{decided: &decision{isStart: true, pins: pins}})
}

// signPins notes the pinned master keys that were signed while the resolver worked.
func (m *model) signPins(signed func(user int) bool) {
	known := m.read()
	for user, pin := range m.pins {
		u := known.users[user]
		if u.hasIdentity && u.identity.master == pin && !u.verified && signed(user) {
			m.past = append(m.past, happening{decided: &decision{user: user, verifies: true, master: pin, signsPin: true}})
		}
	}
}

// knowledge of a reader of the whole history.

type modelUser struct {
	hasIdentity, hasKey bool
	identity            keyIndex
	first               int
	// verified: our signature on today's master key counts. wasVerified: one on some master key did, and nobody has withdrawn it.
	verified, wasVerified bool
	withdrawn             map[int]bool
	pin                   int // -1: none
	living                map[int]copyOf
	// facts are the self-signing keys whose signatures on a device were seen, with the key known.
	facts map[int]map[keyIndex]bool
}

type modelClaim struct {
	isDirect bool
	order    int
	// copy is the device's keys as they are known for this session; nil: the session is not bound to a device.
	copy   *copyOf
	bound  bool
	state  State
	master int // -1: not proven
}

type reader struct {
	users  []*modelUser
	claims map[int]map[modelDevice]*modelClaim
}

func (m *model) read() *reader {
	if m.last == nil || m.lastRead != len(m.past) {
		m.last, m.lastRead = m.readAll(), len(m.past)
	}
	return m.last
}

func (m *model) readAll() *reader {
	r := &reader{claims: make(map[int]map[modelDevice]*modelClaim)}
	for range historyUsers {
		r.users = append(r.users, &modelUser{pin: -1, withdrawn: make(map[int]bool), living: make(map[int]copyOf), facts: make(map[int]map[keyIndex]bool)})
	}
	for i, h := range m.past {
		switch {
		case h.observed != nil:
			r.observe(h.observed)
		case h.received != nil:
			r.receive(i, h.received)
		default:
			r.decide(h.decided)
		}
	}
	return r
}

func (r *reader) observe(o *observation) {
	u := r.users[o.user]
	u.living = o.living
	if o.hasIdentity {
		if !u.hasIdentity {
			u.first = o.identity.master
		}
		if !u.hasIdentity || u.identity.master != o.identity.master {
			u.verified, u.hasKey = false, false
		}
		u.hasIdentity, u.identity.master = true, o.identity.master
		if o.hasSelfSigning {
			u.hasKey, u.identity.key = true, o.identity.key
		}
		if o.vouched && !u.withdrawn[u.identity.master] {
			u.verified, u.wasVerified = true, true
		}
	}
	for d, shown := range o.living {
		u.note(d, shown)
	}
	r.judge(o.user)
}

// note takes a copy of a device's keys for what it proves: who has signed it, whether or not we know yet whose key that is.
func (u *modelUser) note(d int, shown copyOf) {
	if u.facts[d] == nil {
		u.facts[d] = make(map[keyIndex]bool)
	}
	for k := range shown.signed {
		u.facts[d][k] = true
	}
}

func (r *reader) decide(d *decision) {
	if d.isStart {
		for user, u := range r.users {
			former := u.pin
			u.pin = -1
			if pin, pinned := d.pins[user]; pinned && u.hasIdentity {
				u.pin = pin
			} else if pinned {
				u.pin = pin
				continue
			}
			if former >= 0 && former != u.pin && u.hasIdentity {
				u.withdraw(former)
			}
			r.judge(user)
		}
		return
	}
	u := r.users[d.user]
	if d.verifies {
		delete(u.withdrawn, d.master)
		u.verified, u.wasVerified = true, true
	} else {
		u.withdraw(u.identity.master)
	}
	r.judge(d.user)
}

func (u *modelUser) withdraw(master int) {
	u.withdrawn[master] = true
	u.wasVerified = false
	if u.identity.master == master {
		u.verified = false
	}
}

func (r *reader) receive(order int, key *reception) {
	if r.claims[key.session] == nil {
		r.claims[key.session] = make(map[modelDevice]*modelClaim)
	}
	claims := r.claims[key.session]
	stored := claims[key.from]
	if !key.isDirect {
		if stored == nil {
			claims[key.from] = &modelClaim{order: order, state: StateUnknownDevice, master: -1}
		}
		return
	}
	arrived := &modelClaim{isDirect: true, order: order, state: StateUnknownDevice, master: -1}
	if stored != nil {
		arrived.order = stored.order
	}
	if key.embedded != nil {
		embedded := key.embedded.clone()
		arrived.copy, arrived.bound = &embedded, true
		r.users[key.from.user].note(key.from.device, embedded)
	}
	r.walk(key.from, arrived)
	if !keeps(stored, arrived) {
		claims[key.from] = arrived
	}
	r.judge(key.from.user)
}

// keeps says that what is known of a claim outweighs what has come: it is worth more, or was condemned and is not proven now.
func keeps(stored, arrived *modelClaim) bool {
	worth := func(c *modelClaim) int {
		return slices.Index([]State{StateRejected, StateUnknownDevice, StateDeviceInfo, StateVerificationViolation, StateSenderUnverified, StateSenderVerified}, c.state)
	}
	switch {
	case stored == nil || !stored.isDirect:
		return false
	case stored.state == StateRejected:
		return arrived.master < 0
	case arrived.state == StateRejected:
		return stored.master >= 0
	case stored.state == StateDeviceInfo && arrived.state == StateDeviceInfo && stored.isDoubtful():
		return !arrived.isDoubtful()
	default:
		return worth(stored) > worth(arrived)
	}
}

// isDoubtful says that the session's copy of its device's keys names somebody who has not signed it.
func (c *modelClaim) isDoubtful() bool { return c.copy != nil && len(c.copy.forged) > 0 }

// walk is the steps A–J on what is known now.
func (r *reader) walk(from modelDevice, c *modelClaim) {
	u := r.users[from.user]
	living, lives := u.living[from.device]
	if !c.bound {
		if !lives {
			return
		}
		shown := living.clone()
		c.copy, c.bound = &shown, true
	}
	if c.copy == nil {
		bare := copyOf{}.clone()
		c.copy = &bare
	}
	c.state = StateDeviceInfo
	facts := u.facts[from.device]
	names := func(copied copyOf, k keyIndex) bool { return copied.signed[k] || copied.forged[k] }
	current := *c.copy
	if len(current.signed)+len(current.forged) == 0 && len(facts) == 0 {
		if !lives || len(living.signed)+len(living.forged) == 0 {
			return
		}
		current = living.clone()
	}
	if !u.hasIdentity || !u.hasKey {
		return
	}
	today := u.identity
	if !names(current, today) && !facts[today] {
		if !lives || !names(living, today) {
			return
		}
		current = living.clone()
	}
	if current.forged[today] {
		c.state, c.copy = StateRejected, nil
		return
	}
	c.master, c.copy = today.master, nil
	c.state = u.worth(today.master)
}

// worth is what a session is worth that was proven by a master key.
func (u *modelUser) worth(master int) State {
	switch {
	case u.pin >= 0 && u.pin != u.identity.master:
		return StateVerificationViolation
	case u.verified && master == u.identity.master:
		return StateSenderVerified
	case u.verified:
		return StateSenderUnverified
	case u.wasVerified:
		return StateVerificationViolation
	default:
		return StateSenderUnverified
	}
}

// judge brings all sessions of a user in line with what is known now: first what is proven, then, when that leads no further, what is not.
func (r *reader) judge(user int) {
	u := r.users[user]
	r.each(user, func(from modelDevice, c *modelClaim) {
		if c.master >= 0 {
			r.proven(u, from, c)
		}
	})
	look := func(from modelDevice, c *modelClaim) {
		if looked := *c; c.isDirect && (c.state == StateUnknownDevice || c.state == StateDeviceInfo) {
			if r.walk(from, &looked); looked.state != c.state {
				*c = looked
			}
		}
	}
	r.each(user, look)
}

// each takes the user's claims, in no order.
func (r *reader) each(user int, do func(from modelDevice, c *modelClaim)) {
	for _, claims := range r.claims {
		for from, c := range claims {
			if from.user == user {
				do(from, c)
			}
		}
	}
}

// proven judges a proven session: by today's identity if that vouches for its device, else by the one that did.
func (r *reader) proven(u *modelUser, from modelDevice, c *modelClaim) {
	violated := u.worth(u.identity.master) == StateVerificationViolation
	verified := u.worth(u.identity.master) == StateSenderVerified
	counts := verified || !violated && u.identity.master == u.first
	vouched := u.hasKey && u.facts[from.device][u.identity]
	switch {
	case vouched && (c.master == u.identity.master || counts):
		c.master = u.identity.master
		c.state = u.worth(c.master)
	case c.master != u.identity.master:
		c.state = u.worth(c.master)
	default:
		c.master, c.state, c.copy = -1, StateDeviceInfo, nil
	}
}

// What the hook is asked for.

func (m *model) claims(session int) map[modelDevice]*modelClaim { return m.read().claims[session] }

func (m *model) claim(session int, from modelDevice) *modelClaim { return m.claims(session)[from] }

// sessionOfAnother says that another device has claimed the session.
func (m *model) sessionOfAnother(session int, from modelDevice) bool {
	for other := range m.claims(session) {
		if other != from {
			return true
		}
	}
	return false
}

// verdict is the code of a message that a user sends in a session. Of several claims the hook says which it takes for the owner's.
func (m *model) verdict(session, sender int, owner modelDevice) Code {
	r := m.read()
	living := make(map[modelDevice]*modelClaim)
	for from, c := range r.claims[session] {
		if c.state != StateRejected {
			living[from] = c
		}
	}
	if len(living) == 0 {
		return CodeSessionRejected
	}
	claimed, anonymous := false, false
	for from, c := range living {
		claimed = claimed || from.user == sender && c.isDirect
		anonymous = anonymous || !c.isDirect
	}
	c, u := living[owner], r.users[owner.user]
	switch {
	case c == nil:
		return "the owner has no claim"
	case !claimed && !anonymous:
		return CodeMismatchedSender
	case len(living) > 1:
		return CodeSessionConflict
	case !c.isDirect:
		return CodeAuthenticityNotGuaranteed
	}
	switch c.state {
	case StateSenderVerified:
		return CodeVerified
	case StateVerificationViolation:
		return CodeVerificationViolation
	case StateSenderUnverified:
		if c.master == u.identity.master && c.master == u.first {
			return CodeUnverifiedIdentity
		}
		return CodeIdentityChanged
	case StateDeviceInfo:
		return CodeUnsignedDevice
	default:
		return CodeUnknownDevice
	}
}
